"""Makes a view of a dataset directory that keeps a share of its training mentions; nothing is copied."""

import os
from pathlib import Path, PurePath

from dsmip.errors import UserError
from dsmip.manifest import MANIFEST_FILE, SplitCounts
from dsmip.remote import is_uri
from dsmip.shards import Dataset
from dsmip.views import TRAIN, View, draw_rows, parse_view, write_view


def make_view(base: str | Path, out: Path, fraction: float, seed: int) -> Dataset:
    """A view in the folder `out` of the dataset at `base`, opened; an equal one that is there already stays.

    Raises:
        UserError: `base` is no dataset or itself a view, or `out` holds something else.
    """
    dataset = Dataset.open(base)
    if dataset.files != dataset.own:
        raise UserError(f"{base}: is a view itself; make the new one of the dataset that it is a view of")
    rows = draw_rows(dataset.num_mentions(TRAIN), fraction, seed)
    kept = set(rows)
    images = [mention.image is not None for row, mention in enumerate(dataset.mentions(TRAIN)) if row in kept]
    view = View(
        view_of=_way(dataset.location, out),
        base_sha256=dataset.manifest_hash,
        train_fraction=fraction,
        seed=seed,
        train=SplitCounts(mentions=len(rows), with_image=sum(images)),
        train_keys=tuple(f"{TRAIN}-{row:08d}" for row in rows),
    )
    if out.is_dir() and any(out.iterdir()):
        path = out / MANIFEST_FILE
        if not path.is_file() or parse_view(path.read_bytes(), str(path)) != view:
            raise UserError(f"{out}: is not empty and no such view; choose another folder")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    else:
        write_view(out, view)
    return Dataset.open(out)


def _way(location: str, out: Path) -> str:
    """To a dataset: a URI, or a path from `out`. Links are resolved: ".." leads up from where a link points to."""
    return location if is_uri(location) else PurePath(os.path.relpath(location, out.resolve())).as_posix()
