"""Bundles on the Hugging Face hub: fetched into its cache, and put there."""

from pathlib import Path

from dsmip.errors import UserError, first_line
from dsmip.linking.bundle import is_bundle

HUB = "hf-hub:"


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
    except (OSError, ValueError) as error:  # the hub's own errors are of both kinds
        raise UserError(
            f"{address} cannot be had ({first_line(error)}); check the name, the network and HF_TOKEN"
        ) from None
    if not is_bundle(folder):
        raise UserError(f"{address} is no bundle of 'dsmip export' (no bundle.json)")
    return folder


def push_bundle(folder: Path, name: str) -> str:
    """Puts a bundle onto the hub, into a repository that is made private where it is not there.

    Returns:
        Its address for `dsmip.load`.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="dsmip export")
    except (OSError, ValueError) as error:
        raise UserError(f"--push {name}: {first_line(error)}; the bundle is at {folder}") from None
    return f"{HUB}{name}"
