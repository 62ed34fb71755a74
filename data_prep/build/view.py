"""Views of a dataset directory that keep a share of its training mentions; nothing is copied."""

import os
from pathlib import Path, PurePath

from data_prep.build.mention_shards import training_order
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import TRAIN, SplitCounts, Take, View, draw_rows, parse_view
from dsmip.errors import UserError
from dsmip.storage.atomic import json_text, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.storage.locations import local_path
from dsmip.storage.object_store import ObjectStore, is_uri


def make_view(base: str | Path, out: str | Path, fraction: float, seed: int, take: Take = "random") -> Dataset:
    """Makes a view and opens it; an equal one that is there already stays.

    Args:
        base: Where the dataset is, a folder or a URI.
        out: Where the view goes, a folder or a URI.
        fraction: The share of training mentions to keep.
        seed: Draws them; the view of a smaller share lies in that of a larger one.
        take: `first`: none are drawn, but the first ones of the release are kept (`first_rows`).

    Raises:
        UserError: `base` is no dataset or itself a view, or lies in a folder though `out` does not, or `out` holds
            something else.
    """
    dataset = Dataset.open(base)
    if dataset.files != dataset.own:
        raise UserError(f"{base}: is a view itself; make the new one of the dataset that it is a view of")
    num_mentions = dataset.num_mentions(TRAIN)
    if take == "first":
        rows = first_rows(num_mentions, fraction, dataset.manifest.seed)
    else:
        rows = draw_rows(num_mentions, fraction, seed)
    kept = set(rows)
    images = [mention.image is not None for row, mention in enumerate(dataset.mentions(TRAIN)) if row in kept]
    folder = local_path(out)
    view = View(
        view_of=_relative_address(dataset.location, folder),
        base_sha256=dataset.manifest_hash,
        train_fraction=fraction,
        take=take,
        seed=seed if take == "random" else None,
        train=SplitCounts(mentions=len(rows), with_image=sum(images)),
        train_keys=tuple(f"{TRAIN}-{row:08d}" for row in rows),
    )
    if folder is None:
        _put(view, str(out))
    else:
        _write(view, folder)
    return Dataset.open(out)


def first_rows(num_mentions: int, fraction: float, seed: int) -> list[int]:
    """Positions, ascending, of the first int(fraction * num_mentions) in the release's order, at least one.

    As papers take them that report on few mentions; mentions that preparation rejected do not count.

    Args:
        num_mentions: Of training.
        fraction: The share to keep.
        seed: What the dataset was prepared with: it ordered the mentions in the shards.
    """
    count = max(int(fraction * num_mentions), min(num_mentions, 1))
    return [row for row, place in enumerate(training_order(num_mentions, seed)) if place < count]


def _relative_address(location: str, out: Path | None) -> str:
    """A dataset's address in a view at `out`: a URI, or a path from there.

    Links are resolved: ".." leads up from where a link points to.

    Raises:
        UserError: The view goes into a store and the dataset lies in a folder.
    """
    if is_uri(location):
        return location
    if out is None:
        raise UserError(f"{location}: is a folder of this machine; a view of it goes into a folder as well")
    return PurePath(os.path.relpath(location, out.resolve())).as_posix()


def _write(view: View, out: Path) -> None:
    """Writes the view's manifest into a folder."""
    if out.is_dir() and any(out.iterdir()):
        path = out / MANIFEST_FILE
        if not path.is_file() or parse_view(path.read_bytes(), str(path)) != view:
            raise UserError(f"{out}: is not empty and no such view; choose another folder")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    else:
        write_json(out / MANIFEST_FILE, view.model_dump(mode="json"))


def _put(view: View, uri: str) -> None:
    """Writes the view's manifest into an object store."""
    store = ObjectStore(uri)
    content = store.read(MANIFEST_FILE)
    if content is None:
        store.write(MANIFEST_FILE, json_text(view.model_dump(mode="json")).encode())
    elif parse_view(content, store.address(MANIFEST_FILE)) != view:
        raise UserError(f"{uri}: is not empty and no such view; choose another place")
