"""Bundles where they are: in a folder, in an object store, or on the Hugging Face hub; those elsewhere are fetched."""

import hashlib
import shlex
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dsmip.errors import UserError, first_line
from dsmip.evaluation.stored.layout import CALIBRATION
from dsmip.linking.bundle import BUNDLE, is_bundle, parse_manifest
from dsmip.storage.atomic import atomic_path
from dsmip.storage.cache import checked_copy, data_cache
from dsmip.storage.dataset_storage import FileInfo
from dsmip.storage.locations import Location, local_path
from dsmip.storage.object_store import ObjectStore
from dsmip.storage.run_storage import RunStorage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hf-hub:"


@dataclass(frozen=True)
class FoundBundle:
    """A bundle that is here.

    Attributes:
        folder: It.
        why_kept: Why its entities must not be changed; None: they may be.
    """

    folder: Path
    why_kept: str | None = None


def find_bundle(location: Location) -> FoundBundle | None:
    """The bundle at a location; None: there is none, but perhaps a run.

    Raises:
        UserError: It cannot be had, or is damaged.
    """
    if isinstance(location, RunStorage):
        return None
    if isinstance(location, str) and location.startswith(HUB):
        return FoundBundle(bundle_of_hub(location), _kept(location, "the hub's"))
    folder = local_path(location)
    if folder is None:
        fetched = _of_store(str(location).rstrip("/"))
        return None if fetched is None else FoundBundle(fetched, _kept(str(location), "in a store"))
    return FoundBundle(folder) if is_bundle(folder) else None


def _kept(location: str, whose: str) -> str:
    return f"{location} is {whose}: copy the bundle into a folder of your own to change its entities"


def _of_store(uri: str) -> Path | None:
    """The copy of a store's bundle on this node; files that are there already, and whole, are not fetched again."""
    store = ObjectStore(uri)
    content = store.read(BUNDLE)
    if content is None:
        return None
    manifest, _ = parse_manifest(content, store.address(BUNDLE))
    folder = data_cache() / hashlib.sha256(content).hexdigest()[:32]
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / BUNDLE) as temporary:
        temporary.write_bytes(content)
    for name, file in manifest.files.items():
        stated = FileInfo(name, file.sha256, file.bytes)
        try:
            checked_copy(folder / name, stated, store.address(name), lambda target, name=name: store.get(name, target))  # type: ignore[misc]
        except FileNotFoundError:
            raise UserError(f"{store.address(name)} is missing: the bundle is damaged; copy it again") from None
    return folder


def bundle_of_hub(address: str) -> Path:
    """The folder of the hub's cache that holds a bundle; it is fetched where it is not there, or is out of date.

    Args:
        address: hf-hub:owner/name.

    Raises:
        UserError: It cannot be had, or is no bundle.
    """
    from huggingface_hub import snapshot_download

    name = address.removeprefix(HUB)
    try:
        folder = Path(snapshot_download(name))
    except _hub_errors() as error:
        raise UserError(
            f"{address} cannot be had ({first_line(error)}); check the name, the network and HF_TOKEN"
        ) from None
    if not is_bundle(folder):
        raise UserError(f"{address} is no bundle of 'dsmip export' (no bundle.json)")
    return folder


def push_bundle(folder: Path, name: str) -> str:
    """Puts a bundle onto the hub, into a repository that is made private where it is not there.

    Files that a bundle had there before, and this one has not, go in the same commit; any others stay.

    Returns:
        Its address for `dsmip.load`.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        before = [escape(path) for path in (*_pushed_before(api, name), CALIBRATION)]  # which older versions left there
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="dsmip export", delete_patterns=before)
    except _hub_errors() as error:
        raise UserError(
            f"--push {name}: the hub does not take it ({first_line(error)}); check the name, the network and HF_TOKEN; "
            f"the bundle is at {folder}; then: {shlex.join(['hf', 'upload', name, str(folder)])}"
        ) from None
    return f"{HUB}{name}"


def _pushed_before(api: "HfApi", name: str) -> list[str]:
    """Files of the bundle that is in a repository; none where there is no bundle of this version."""
    if not api.file_exists(name, BUNDLE):
        return []
    path = Path(api.hf_hub_download(name, BUNDLE))
    try:
        manifest, _ = parse_manifest(path.read_bytes(), f"{HUB}{name}")
    except UserError:
        return []
    return list(manifest.files)


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors, and those of the HTTP client that these are derived from."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)))
