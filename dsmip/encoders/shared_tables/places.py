"""The places where feature tables are shared: one that a variable names, else beside the data, else on this node.

`DSMIP_FEATURES` is a folder or URI that all nodes see, or `run`: every run then keeps its own.
"""

import os
from contextlib import suppress
from pathlib import Path

from dsmip.data.dataset import Dataset
from dsmip.encoders.shared_tables.tables import SharedTables
from dsmip.errors import UserError
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.storage.locations import local_path, open_dataset_storage, open_run_storage
from dsmip.storage.object_store import cache_folder, private_cache

PLACE = "DSMIP_FEATURES"
FOLDER = "feature_cache"
_OF_RUNS = "run"
_ON_NODE = "features"


def places_of(dataset: Dataset) -> list[SharedTables]:
    """Where tables of these data are looked for. A view's are those of the data set that it is a view of."""
    named = os.environ.get(PLACE)
    if named == _OF_RUNS:
        return []
    if named:
        return [SharedTables(open_run_storage(named))]
    beside = _beside(dataset.files.location)
    with suppress(UserError):
        if (cache_folder() / _ON_NODE).is_dir():
            return [beside, _on_node()]
    return [beside]


def writable_place(dataset: Dataset) -> SharedTables | None:
    """Where a new table of these data is put; None: nowhere, or runs are to keep their own."""
    for place in places_of(dataset):
        if place.is_writable:
            return place
    if not os.environ.get(PLACE):
        with suppress(UserError, OSError):
            place = _on_node()
            return place if place.is_writable else None
    return None


def place_at(location: str | None) -> SharedTables:
    """The tables of a data set, or those that lie at a place itself.

    Args:
        location: A folder or URI; None: what the variable names, else this node's.

    Raises:
        UserError: There is nothing of the kind.
    """
    named = os.environ.get(PLACE)
    if location is None:
        return SharedTables(open_run_storage(named)) if named and named != _OF_RUNS else _on_node()
    folder = local_path(location)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{location}: no such folder; give a data set, or a folder of feature tables")
    with suppress(UserError):
        open_dataset_storage(location)
        return _beside(Dataset.open(location).files.location)
    if folder is not None and (folder / MANIFEST_FILE).is_file():
        Dataset.open(location)  # says what is wrong with it
    return SharedTables(open_run_storage(location))


def open_address(address: str) -> tuple[SharedTables, str]:
    """The place and the key of a table's address (`address_of`)."""
    place, _, name = address.rpartition("/")
    return SharedTables(open_run_storage(place)), name


def address_of(place: SharedTables, path: Path) -> str:
    """What another node finds a table by that this one has at a path."""
    return f"{place.storage.location}/{path.stem}"


def _beside(data: str) -> SharedTables:
    return SharedTables(open_run_storage(f"{data.rstrip('/')}/{FOLDER}"))


def _on_node() -> SharedTables:
    return SharedTables(open_run_storage(private_cache(_ON_NODE)))
