"""The entity index: everything about an entity that does not depend on a mention, computed once, read by every ranking.

<folder>/slice-000000.safetensors   prepared entities (a `Table`), a fixed number of kb rows each, memory-mapped
<folder>/index.json                 written last: what it was made from, and rows and bytes of each slice

Slices do not depend on each other: whoever builds them (`dsmip.evaluation.index_builder`) may do so in any order, and
goes on from those that are there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmip.data.table import Table, concatenate
from dsmip.errors import UserError
from dsmip.storage.atomic import write_json
from dsmip.storage.parsing import read_json

MANIFEST = "index.json"
SLICE_ROWS = 4096
LAYOUT = 2  # of slices: part of what an index is made from, to be raised when prepared tables change


class EntityIndex:
    """Prepared entities of kb rows `first_row` .. `first_row + len(self)`, in one or several tables.

    Args:
        restored: Makes prepared entities of rows that are stored smaller: only those that are asked for, each time.
    """

    def __init__(
        self, tables: Sequence[Table], first_row: int = 0, restored: Callable[[Table], Table] | None = None
    ) -> None:
        self.tables, self.first_row, self._restored = tuple(tables), first_row, restored
        self._starts = [0]
        for table in self.tables:
            self._starts.append(self._starts[-1] + len(table))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables; rows that entities share are counted once per table."""
        return sum(table.num_bytes for table in self.tables)

    def tiles(self, size: int) -> Iterator[Table]:
        """The entities in order, at most `size` at a time; a tile spans no two tables: only restored ones are new."""
        for table in self.tables:
            for start in range(0, len(table), size):
                rows = slice(start, start + size)
                yield table.rows(rows) if self._restored is None else self._restored(table.take(rows))

    def take(self, columns: Tensor) -> Table:
        """The entities at the positions `columns` (int64 [n], ascending) in this index, with the stored rows they use.

        Raises:
            ValueError: No position at all.
        """
        chosen = []
        for (start, stop), table in zip(pairwise(self._starts), self.tables, strict=True):
            inside = columns[(columns >= start) & (columns < stop)]
            if len(inside):
                chosen.append(table.take(inside - start))
        rows = concatenate(chosen)
        return rows if self._restored is None else self._restored(rows)

    def under(self, prefix: str) -> "EntityIndex":
        """The same entities, with the columns named `prefix.*` alone, without the prefix."""
        return self._of(table.under(prefix) for table in self.tables)

    def to(self, device: torch.device) -> "EntityIndex":
        """The same entities on a device, as they are stored."""
        return self._of(table.to(device) for table in self.tables)

    def _of(self, tables: Iterable[Table]) -> "EntityIndex":
        return EntityIndex(list(tables), self.first_row, self._restored)

    def slice(self, number: int, num_slices: int) -> "EntityIndex":
        """One of `num_slices` contiguous slices of nearly equal size."""
        first, stop = len(self) * number // num_slices, len(self) * (number + 1) // num_slices
        cut = [
            table.rows(slice(max(first - start, 0), max(stop - start, 0)))
            for start, table in zip(self._starts, self.tables, strict=False)
        ]
        return EntityIndex([table for table in cut if len(table)], self.first_row + first, self._restored)

    @staticmethod
    def open(folder: Path, made_from: dict[str, Any]) -> "EntityIndex":
        """Opens a finished index memory-mapped.

        Raises:
            UserError: There is none, it was made from something else, or a slice is missing or cut off.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"no index at {folder} (no {MANIFEST})")
        found, slices = read_json(path, _stored, "; delete the folder to build the index again")
        for key, value in made_from.items():
            if found.get(key) != value:
                raise UserError(f"{path}: the index was made from {key} {found.get(key)}, not {value}")
        for name, num_bytes, _ in slices:
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != num_bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {num_bytes}"
                raise UserError(f"{folder / name} {state}; delete {folder} to build the index again")
        return EntityIndex([_load_slice(folder / name, num_rows) for name, _, num_rows in slices])


def _stored(manifest: Any) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """What an index was made from, and name, bytes and rows of each slice."""
    slices = [(str(entry["file"]), int(entry["bytes"]), int(entry["rows"])) for entry in manifest["slices"]]
    return dict(manifest["made_from"]), slices


def slice_path(folder: Path, number: int) -> Path:
    """The file of one of an index's slices."""
    return folder / f"slice-{number:06d}.safetensors"


def index_slices(folder: Path, num_entities: int, slice_rows: int = SLICE_ROWS) -> dict[Path, range]:
    """The files of an index and the kb rows of each."""
    starts = range(0, num_entities, slice_rows)
    return {
        slice_path(folder, number): range(start, min(start + slice_rows, num_entities))
        for number, start in enumerate(starts)
    }


def finish_index(folder: Path, made_from: dict[str, Any], slices: Mapping[Path, range]) -> EntityIndex:
    """Opens the index at `folder`; where all of its slices have just been built, checks them and writes the manifest.

    The folder must belong to `made_from` alone (carry a hash of it in its name).

    Raises:
        UserError: A slice is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        for path, rows in slices.items():
            _load_slice(path, len(rows))
        entries = [
            {"file": path.name, "rows": len(rows), "bytes": path.stat().st_size} for path, rows in slices.items()
        ]
        write_json(folder / MANIFEST, {"made_from": made_from, "slices": entries})
    return EntityIndex.open(folder, made_from)


def _load_slice(path: Path, num_rows: int) -> Table:
    try:
        table = Table.load(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}); delete {path.parent} to build the index again"
        ) from error
    if len(table) != num_rows:
        raise UserError(
            f"{path} has {len(table)} entities instead of {num_rows}; delete {path.parent} to build the index again"
        )
    return table
