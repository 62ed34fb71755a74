"""Verification of one shard: its digest, its samples, and what the table of entities says of them."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from dsmip.data.manifest import ENTITIES_FILE, KB, SPLITS, ShardInfo
from dsmip.data.records import ENTITY_SCHEMA, NO_ROW, read_mention
from dsmip.data.tar import Fields, Sample, json_field, read_shard, read_span
from dsmip.errors import UserError
from dsmip.storage.atomic import sha256_file
from dsmip.storage.dataset_storage import DatasetStorage

_TEXT_COLUMNS = ("entity_row", "entity_id", "name", "attributes", "num_images")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong.

    Attributes:
        file: Path of the file below the dataset.
        sample: Key of the sample in it, where it is one.
        what: What is wrong.
    """

    file: str
    sample: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"sample {self.sample}: " if self.sample else "") + self.what


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to check.

    Attributes:
        files: The dataset's files.
        shard: What the manifest says of the shard.
        split: The section, or the kb.
        table: Path of entities.parquet; None when it cannot be read.
    """

    files: DatasetStorage
    shard: ShardInfo
    split: str
    table: Path | None


@dataclass(frozen=True, slots=True)
class Copy:
    """A gold entity as a mention's sample holds it.

    Attributes:
        sample: Key of the sample.
        row: The entity's row.
        record: Digest of its record.
        images: Digests of its images.
    """

    sample: str
    row: int
    record: bytes
    images: tuple[bytes, ...]


@dataclass(slots=True)
class Findings:
    """What was found in one shard.

    Attributes:
        samples: How many there are.
        with_image: How many of them have an image.
        num_images: How many images there are.
        problems: What is wrong.
        records: Of a shard of the kb, digests of records by entity row.
        images: Of a shard of the kb, digests of images by entity row.
        copies: Of a shard of mentions, their gold entities.
    """

    samples: int
    with_image: int
    num_images: int
    problems: list[Problem]
    records: dict[int, bytes]
    images: dict[int, tuple[bytes, ...]]
    copies: list[Copy]


def check_shard(task: ShardTask) -> Findings:
    """Checks all that can be checked of a shard by itself and by the table of entities."""
    found = Findings(0, 0, 0, [], {}, {}, [])
    report = _Reporter(task.shard.path, found.problems)
    with task.files.fresh(task.shard.path) as path:
        if path.is_file():
            _check_file(task, path, found, report)
        else:
            report("the shard is missing")
    return found


def _check_file(task: ShardTask, path: Path, found: Findings, report: "_Reporter") -> None:
    shard, size = task.shard, path.stat().st_size
    if size != shard.bytes:
        report(f"{size} bytes, the manifest says {shard.bytes}")
    if sha256_file(path) != shard.sha256:
        report("its SHA-256 is not the manifest's")
    rows = _rows_of_shard(task.table, shard) if task.split == KB and task.table else None
    last = "its start"
    try:
        with path.open("rb") as stream:
            for sample in read_shard(path):
                last = f"sample {sample.key}"
                found.samples += 1
                if task.split == KB:
                    record = None if rows is None else next(rows, None)
                    _check_entity(sample, record, rows is not None, stream, found, report)
                else:
                    _check_mention(sample, task.split in SPLITS, found, report)
    except UserError as error:
        report(f"cannot be read beyond {last} ({_reason(error)})")
    if found.samples != shard.samples:
        report(f"{found.samples} samples (up to {last}), the manifest says {shard.samples}")


class _Reporter:
    """Adds problems of one file."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self._file, self._problems = file, problems

    def __call__(self, what: str, sample: str | None = None) -> None:
        self._problems.append(Problem(self._file, sample, what))


def _rows_of_shard(path: Path, shard: ShardInfo) -> Iterator[dict[str, Any]]:
    table = readable_table(path)
    for batch in table.filter(pc.equal(table.column("shard"), shard.path)).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _check_entity(
    sample: Sample,
    row: Mapping[str, Any] | None,
    has_rows: bool,
    stream: io.BufferedReader,
    found: Findings,
    report: Callable[[str, str | None], None],
) -> None:
    """Compares a sample of the kb with its row of the table, and its images with the bytes that the row points to."""
    record = _entity_record(sample, "", report)
    if record is None:
        return
    images = _entity_images(sample.fields, "")
    found.with_image += bool(images)
    for number, image in enumerate(images):
        _check_image(image, f"{number}.jpg", sample.key, found, report)
    found.records[record["entity_row"]] = _digest(json_field(record))
    found.images[record["entity_row"]] = tuple(map(_digest, images))
    if not has_rows:
        return
    if row is None:
        report(f"{ENTITIES_FILE} has no row for it", sample.key)
        return
    if row["key"] != sample.key:
        report(f"{ENTITIES_FILE} has the key {row['key']} (row {row['entity_row']}) in its place", sample.key)
    for column in _TEXT_COLUMNS:
        if record[column] != row[column]:
            report(f"{column} is {_short(record[column])}, in {ENTITIES_FILE} {_short(row[column])}", sample.key)
    spans = list(zip(row["image_offsets"] or [], row["image_sizes"] or [], strict=False))
    if len(spans) != len(images):
        report(f"{len(images)} pictures, {ENTITIES_FILE} has places for {len(spans)}", sample.key)
    for number, ((offset, size), image) in enumerate(zip(spans, images, strict=False)):
        try:
            same = read_span(stream, offset, size) == image
        except UserError:
            same = False
        if not same:
            report(f"{number}.jpg does not lie where {ENTITIES_FILE} says ({offset} + {size})", sample.key)


def _check_mention(sample: Sample, has_gold: bool, found: Findings, report: Callable[[str, str | None], None]) -> None:
    """Checks a mention's sample by itself; its copy of the gold entity, if it should have one, is kept as digests."""
    try:
        mention = read_mention(sample.fields, "")
    except UserError as error:
        report(_reason(error), sample.key)
        return
    if mention.image is not None:
        found.with_image += 1
        _check_image(mention.image, "jpg", sample.key, found, report)
    if not has_gold:
        if mention.entity_row != NO_ROW:
            report(f"its gold is row {mention.entity_row}, but this shard is of mentions that have none", sample.key)
        if extra := sorted(set(sample.fields) - {"json", "jpg"}):
            report(", ".join(f"{name} is unexpected" for name in extra), sample.key)
        return
    record = _entity_record(sample, "entity.", report)
    if record is None:
        return
    if (record["entity_row"], record["entity_id"]) != (mention.entity_row, mention.entity_id):
        gold, copy = (
            f"{mention.entity_id} (row {mention.entity_row})",
            f"{record['entity_id']} (row {record['entity_row']})",
        )
        report(f"its gold is {gold}, but it carries entity {copy}", sample.key)
    images = _entity_images(sample.fields, "entity.")
    found.num_images += len(images)
    digests = tuple(map(_digest, images))
    found.copies.append(Copy(sample.key, record["entity_row"], _digest(json_field(record)), digests))


def _entity_record(sample: Sample, prefix: str, report: Callable[[str, str | None], None]) -> dict[str, Any] | None:
    """The record of an entity, whose images should all be there and nothing else; None when it cannot be used."""
    try:
        record = json.loads(sample.fields[f"{prefix}json"])
        text = {key: record[key] for key in _TEXT_COLUMNS}
        count = int(text["num_images"])
        hash(text["entity_row"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        report(f"{prefix}json is no entity ({type(error).__name__}: {error})", sample.key)
        return None
    others = {"json", "jpg"} if prefix else set()
    expected = {f"{prefix}json", *(f"{prefix}{number}.jpg" for number in range(count))}
    fields = set(sample.fields) - others
    if fields != expected:
        lost, extra = sorted(expected - fields), sorted(fields - expected)
        report(
            ", ".join([f"{name} is missing" for name in lost] + [f"{name} is unexpected" for name in extra]), sample.key
        )
    return text


def _entity_images(fields: Fields, prefix: str) -> list[bytes]:
    images: list[bytes] = []
    while (image := fields.get(f"{prefix}{len(images)}.jpg")) is not None:
        images.append(image)
    return images


def _check_image(
    content: bytes, field: str, key: str, found: Findings, report: Callable[[str, str | None], None]
) -> None:
    found.num_images += 1
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.load()
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        # Pillow's message of bytes that are no JPEG holds a memory address.
        reason = "no JPEG" if "cannot identify" in str(error) else str(error)
        report(f"{field} cannot be decoded ({reason})", key)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(error: UserError) -> str:
    """What a shard's error says besides its path."""
    text = str(error)
    return text[text.find("(") + 1 : text.rfind(")")] if "(" in text and ")" in text else text


@lru_cache(2)
def _table(path: Path, modified: int) -> Any:
    """The table, kept as long as the file has not been `modified` since."""
    table = pq.read_table(path, memory_map=True)
    return table if table.schema.equals(ENTITY_SCHEMA) else None


def readable_table(path: Path) -> Any:
    """A table of entities, or None when it cannot be used."""
    try:
        return _table(path, path.stat().st_mtime_ns)
    except (pa.ArrowException, OSError):
        return None
