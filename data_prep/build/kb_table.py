"""The table of the knowledge base while it is made: files of some rows each, looked up by row, joined at the end.

They are Arrow files that are memory-mapped: looking up golds takes no memory that grows with the kb.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dsmip.data.records import ENTITY_SCHEMA
from dsmip.storage.atomic import atomic_path

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class StoredEntity:
    """An entity as it lies in the kb.

    Attributes:
        entity_row: Its row.
        entity_id: Its id.
        name: Its name.
        attributes: Its text.
        shard: Path of its shard below the dataset's folder.
        image_spans: Offset and size in bytes of each image in the shard.
    """

    entity_row: int
    entity_id: str
    name: str
    attributes: str
    shard: str
    image_spans: tuple[tuple[int, int], ...]


def entity_key(row: int) -> str:
    """Key of an entity's sample in the kb's shards."""
    return f"{row:08d}"


def write_rows(path: Path, entities: Iterable[StoredEntity]) -> None:
    """Writes a file of some rows."""
    rows = iter(entities)
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), ENTITY_SCHEMA) as writer:
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_batch(pa.RecordBatch.from_pylist([_row(entity) for entity in chunk], ENTITY_SCHEMA))


def join_shifted(files: Iterable[tuple[Path, int]], target: Path) -> None:
    """Writes the rows of some files, in order, into one such file.

    Args:
        files: Each with the number of bytes that its images lie further on now.
        target: The file to write.
    """
    with atomic_path(target) as temporary, pa.ipc.new_file(str(temporary), ENTITY_SCHEMA) as writer:
        for path, shift in files:
            table = _open(path).combine_chunks()
            column = table.column("image_offsets").combine_chunks()
            offsets = pa.ListArray.from_arrays(column.offsets, pc.add(column.values, shift))
            writer.write_table(
                table.set_column(table.schema.get_field_index("image_offsets"), "image_offsets", offsets)
            )


def write_entities_file(files: Iterable[Path], target: Path) -> None:
    """Writes the rows of all files, in order, into the dataset's parquet file."""
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, ENTITY_SCHEMA, compression="zstd") as writer:
        for path in files:
            writer.write_table(_open(path))


@dataclass(frozen=True)
class KbRows:
    """Files of rows, looked up by row.

    Attributes:
        paths: The files.
        starts: The kb row of each file's first entity, ascending.
    """

    paths: tuple[Path, ...]
    starts: tuple[int, ...]

    def entities(self, rows: Iterable[int]) -> dict[int, StoredEntity]:
        """The entities of some rows, by row."""
        found: dict[int, StoredEntity] = {}
        for file, inside in groupby(sorted(set(rows)), lambda row: bisect_right(self.starts, row) - 1):
            positions = pa.array([row - self.starts[file] for row in inside], pa.int64())
            found |= {
                entity.entity_row: entity for entity in map(_entity, self._tables[file].take(positions).to_pylist())
            }
        return found

    @cached_property
    def _tables(self) -> Sequence[pa.Table]:
        return [_open(path) for path in self.paths]


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _row(entity: StoredEntity) -> dict[str, Any]:
    return {
        "entity_row": entity.entity_row,
        "entity_id": entity.entity_id,
        "name": entity.name,
        "attributes": entity.attributes,
        "num_images": len(entity.image_spans),
        "shard": entity.shard,
        "key": entity_key(entity.entity_row),
        "image_offsets": [offset for offset, _ in entity.image_spans],
        "image_sizes": [size for _, size in entity.image_spans],
    }


def _entity(row: Mapping[str, Any]) -> StoredEntity:
    spans = tuple(zip(row["image_offsets"], row["image_sizes"], strict=True))
    return StoredEntity(row["entity_row"], row["entity_id"], row["name"], row["attributes"], row["shard"], spans)
