"""Locations: the path or object store that one stands for, and the storage of the run or dataset that lies there."""

import re
from pathlib import Path
from urllib.parse import unquote

from dsmip.errors import UserError
from dsmip.storage.dataset_storage import MANIFEST_FILE, MISSING, DatasetStorage, LocalDataset
from dsmip.storage.object_store import is_uri, split_uri
from dsmip.storage.remote_dataset import open_remote_dataset
from dsmip.storage.remote_run import RemoteRun
from dsmip.storage.run_storage import LocalRun, RunStorage

Location = str | Path | RunStorage

_ALMOST_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+:(/|$)")  # a folder of such a name would be a surprise


def local_path(location: str | Path) -> Path | None:
    """The path that a location on this machine stands for, also of a `file://` URI; None for an object store.

    Raises:
        UserError: A `file://` URI of another machine, or a URI that was mistyped or cannot be used.
    """
    if not is_uri(location):
        return path_here(Path(location))
    scheme, authority, path = split_uri(str(location))
    if scheme != "file":
        return None
    if authority not in ("", "localhost"):
        raise UserError(f"{location}: a file URI has three slashes, as file:///{authority}/{path}")
    return Path("/", unquote(path))


def path_here(path: Path) -> Path:
    """The path itself.

    Raises:
        UserError: It was meant as a URI; a Path of one has lost a slash.
    """
    if _ALMOST_URI.match(str(path)):
        how = "give s3://..., gs://... or file:///..., or the full path of a folder of this name"
        raise UserError(f"{path}: neither a path here nor a URI; {how}")
    return path


def open_run_storage(location: Location) -> RunStorage:
    """The storage of a run at a path or URI; a `file://` URI is a folder.

    Raises:
        UserError: It is an address that nothing can open.
    """
    if isinstance(location, RunStorage):
        return location
    if (path := local_path(location)) is not None:
        return LocalRun(path)
    return RemoteRun(str(location).rstrip("/"))


def open_dataset_storage(location: str | Path) -> tuple[DatasetStorage, bytes]:
    """The storage of the dataset at a folder or URI, and its manifest's content.

    Raises:
        UserError: There is none, or the store cannot be read.
    """
    folder = local_path(location)
    if folder is None:
        return open_remote_dataset(str(location))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such dataset directory")
    storage = LocalDataset(folder)
    content = storage.read(MANIFEST_FILE)
    if content is None:
        raise UserError(f"{folder}: {MISSING}")
    return storage, content
