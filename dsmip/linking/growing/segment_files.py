"""Files of segments: written of new entities, or of those of other segments without the rows that were removed."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsmip.data.image_preparation import UnusableImage, prepare_image
from dsmip.data.manifest import ImageSettings
from dsmip.data.records import Entity
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import chunked
from dsmip.evaluation.index import SLICE_ROWS, EntityIndex, finish_index, index_slices, slice_path
from dsmip.linking.bundle import ENTITIES, INDEX, IndexDtype, Segment
from dsmip.linking.growing.preparation import EntityPreparer, WithoutImage
from dsmip.linking.growing.segments import ENTITY_SCHEMA, GROUP_ROWS, live_rows, stored_tables
from dsmip.progress import CountRows

THUMBNAILS = ImageSettings(size=96, quality=85)


def entity_table(entities: Iterable[Entity], *, whole_images: bool) -> pa.Table:
    """Entities as rows of entities.parquet, with their first pictures, small or whole."""
    records: list[dict[str, Any]] = []
    for entity in entities:
        image = entity.images[0] if entity.images else None
        records.append(
            {
                "entity_id": entity.entity_id,
                "name": entity.name,
                "attributes": entity.attributes,
                "image": image if whole_images or image is None else _thumbnail(image),
            }
        )
    return pa.Table.from_pylist(records, ENTITY_SCHEMA)


def _thumbnail(image: bytes) -> bytes:
    try:
        return prepare_image(image, THUMBNAILS)
    except UnusableImage:
        return image  # none at all would say that the entity has no picture


def write_segment(
    folder: Path,
    entities: Iterable[Entity],
    preparer: EntityPreparer,
    dtype: IndexDtype,
    without_image: WithoutImage,
    count: CountRows,
) -> int:
    """Encodes entities, some thousand at a time, into a new folder; how many there were.

    Args:
        folder: Of the segment.
        entities: They are checked; what they raise ends it.
        preparer: Prepares them.
        dtype: Of the index.
        without_image: What those without a picture share.
        count: Takes how many more are written.
    """
    (folder / INDEX).mkdir(parents=True)
    num_entities = 0
    with pq.ParquetWriter(folder / ENTITIES, ENTITY_SCHEMA) as writer:
        for number, chunk in enumerate(chunked(entities, SLICE_ROWS)):
            preparer.prepared(chunk, dtype, without_image).save(slice_path(folder / INDEX, number))
            writer.write_table(entity_table(chunk, whole_images=preparer.whole_images), row_group_size=GROUP_ROWS)
            num_entities += len(chunk)
            count(len(chunk))
    finish_index(folder / INDEX, {}, index_slices(folder / INDEX, num_entities))
    return num_entities


def write_compacted(bundle: Path, segments: Sequence[Segment], folder: Path, count: CountRows) -> None:
    """Copies the entities of segments that are left into one segment, in their order.

    Args:
        bundle: Where the segments are.
        segments: They.
        folder: Of the new one.
        count: Takes how many more are written.
    """
    index = EntityIndex([table for segment in segments for table in stored_tables(bundle, segment)])
    slices = index_slices(folder / INDEX, len(index))
    for path, rows in slices.items():
        index.take(torch.arange(rows.start, rows.stop)).save(path)
        count(len(rows))
    finish_index(folder / INDEX, {}, slices)
    with pq.ParquetWriter(folder / ENTITIES, ENTITY_SCHEMA) as writer:
        for group in _whole_groups(_live_groups(bundle, segments)):
            writer.write_table(group, row_group_size=GROUP_ROWS)


def _live_groups(bundle: Path, segments: Sequence[Segment]) -> Iterator[pa.Table]:
    """Rows that are left, as many as were read at a time."""
    for segment in segments:
        live = live_rows(segment)
        with pq.ParquetFile(bundle / segment.folder / ENTITIES) as file:
            for number in range(file.num_row_groups):
                start = number * GROUP_ROWS
                inside = live[(live >= start) & (live < start + GROUP_ROWS)] - start
                yield file.read_row_group(number).take(pa.array(inside))


def _whole_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, `GROUP_ROWS` at a time: a picture is found by its row."""
    held = ENTITY_SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while len(held) >= GROUP_ROWS:
            yield held.slice(0, GROUP_ROWS)
            held = held.slice(GROUP_ROWS)
    if len(held):
        yield held


def find_without_image(bundle: Path, segments: Sequence[Segment]) -> Table | None:
    """A prepared entity without a picture, as an index stores it; None: all have one."""
    for segment in segments:
        with pq.ParquetFile(bundle / segment.folder / ENTITIES) as file:
            for number in range(file.num_row_groups):
                found = file.metadata.row_group(number).column(ENTITY_SCHEMA.get_field_index("image")).statistics
                if found is not None and found.has_null_count and not found.null_count:
                    continue
                images = file.read_row_group(number, columns=["image"]).column("image")
                missing = images.is_null().to_numpy().nonzero()[0]
                if len(missing):
                    row = number * GROUP_ROWS + int(missing[0])
                    return EntityIndex.open(bundle / segment.folder / INDEX, {}).take(torch.tensor([row]))
    return None
