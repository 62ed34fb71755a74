"""The entities of a bundle, read from its segments as one knowledge base and one index.

Segments come one after the other, without the rows that were removed: so a row is the one that an index has which is
built anew of the same entities in that order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsmip.data.table import Table, concatenate
from dsmip.errors import UserError
from dsmip.evaluation.index import EntityIndex
from dsmip.linking.bundle import ENTITIES, INDEX, IndexDtype, Segment
from dsmip.linking.growing.index_storage import restored
from dsmip.linking.knowledge_base import KnowledgeBase

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENTITY_SCHEMA = pa.schema(
    [("entity_id", pa.string()), ("name", pa.string()), ("attributes", pa.string()), ("image", pa.binary())]
)
GROUP_ROWS = 256  # of entities.parquet that are read for a picture
TEXTS = ENTITY_SCHEMA.names[:3]
_KEPT_GROUPS = 16
_FEW_ROWS = 512  # of a table: it is searched together with its neighbours


def live_rows(segment: Segment) -> "NDArray[np.int64]":
    """The rows of a segment that are entities, ascending."""
    return np.delete(np.arange(segment.entities), np.array(segment.removed, dtype=np.int64))


def stored_tables(folder: Path, segment: Segment) -> Iterator[Table]:
    """Prepared entities of a segment, as they are stored, memory-mapped, without rows that were removed.

    Raises:
        UserError: A slice is missing or cut off.
    """
    live, start = live_rows(segment), 0
    for table in EntityIndex.open(folder / segment.folder / INDEX, {}).tables:
        first, stop = np.searchsorted(live, [start, start + len(table)])
        if stop - first == len(table):
            yield table
        elif stop > first:
            yield table.rows(torch.from_numpy(live[first:stop] - start))
        start += len(table)


def read_index(folder: Path, segments: Sequence[Segment], dtype: IndexDtype) -> EntityIndex:
    """The index of segments as it is searched; it stays in `dtype`, and what is scored becomes float32.

    Raises:
        UserError: A slice is missing or cut off.
    """
    tables, few = list[Table](), list[Table]()
    for table in (table for segment in segments for table in stored_tables(folder, segment)):
        if len(table) < _FEW_ROWS:
            few.append(table)
            continue
        tables, few = [*tables, *_together(few), table], []
    return EntityIndex([*tables, *_together(few)], restored=None if dtype == "float32" else restored)


def _together(tables: Sequence[Table]) -> list[Table]:
    return [concatenate([table.take(slice(None)) for table in tables])] if len(tables) > 1 else list(tables)


def read_texts(folder: Path, segment: Segment, columns: Sequence[str] = TEXTS) -> pa.Table:
    """Columns of a segment's table, without rows that were removed.

    Raises:
        UserError: The table cannot be read, or has another number of rows.
    """
    path = folder / segment.folder / ENTITIES
    try:
        texts = pq.read_table(path, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the bundle again") from None
    if len(texts) != segment.entities:
        raise UserError(f"{path}: {len(texts)} entities instead of {segment.entities}; export the run again")
    return texts.take(pa.array(live_rows(segment))) if segment.removed else texts


def read_entities(folder: Path, segments: Sequence[Segment]) -> KnowledgeBase:
    """The entities of segments; pictures are read some hundred at a time, when they are asked for.

    Files are held open: they may be deleted meanwhile.

    Raises:
        UserError: A table cannot be read, or has another number of rows.
    """
    texts = pa.concat_tables([read_texts(folder, segment) for segment in segments]).combine_chunks()
    files = [pa.memory_map(str(folder / segment.folder / ENTITIES)) for segment in segments]
    live = [live_rows(segment) for segment in segments]
    starts = np.cumsum([0, *map(len, live)])

    @lru_cache(maxsize=_KEPT_GROUPS)
    def group(segment: int, number: int) -> pa.ChunkedArray:
        return pq.ParquetFile(files[segment]).read_row_group(number, columns=["image"]).column("image")

    return KnowledgeBase(texts, partial(_image_of, live, starts, group))


def _image_of(
    live: Sequence["NDArray[np.int64]"],
    starts: "NDArray[np.int64]",
    group: Callable[[int, int], pa.ChunkedArray],
    row: int,
) -> bytes | None:
    segment = int(np.searchsorted(starts, row, side="right")) - 1
    stored = int(live[segment][row - starts[segment]])
    return group(segment, stored // GROUP_ROWS)[stored % GROUP_ROWS].as_py()  # type: ignore[no-any-return]
