"""Whether a dataset directory is what its manifest says: every digest, every count, every record and picture.

Shards are read one by one, so memory holds one sample, and of the kb one digest per picture. All problems are
collected: a damaged file does not hide the next one.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from dsmip.errors import UserError
from dsmip.files import sha256_file
from dsmip.manifest import ENTITIES_FILE, KB, REJECTS_FILE, SPLITS, Manifest, ShardInfo, read_manifest
from dsmip.processes import map_tasks
from dsmip.progress import Progress, counting, no_progress
from dsmip.samples import read_mention
from dsmip.shards import ENTITY_SCHEMA
from dsmip.tars import Fields, Sample, json_field, read_place, read_shard

MAX_PROBLEMS = 100
_TEXT_COLUMNS = ("entity_row", "entity_id", "name", "attributes", "num_images")
_ACTIONS = {"rejected": "rejects", "repaired": "repaired", "degraded": "degraded"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong in which file (path below the dataset) and, where it can be told, in which sample of it."""

    file: str
    sample: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"sample {self.sample}: " if self.sample else "") + self.what


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read, and what was found wrong: the first MAX_PROBLEMS of `num_problems`, in the files' order."""

    shards: int
    samples: int
    pictures: int
    num_problems: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return self.num_problems == 0


@dataclass(frozen=True, slots=True)
class _Task:
    folder: Path
    shard: ShardInfo
    part: str
    has_table: bool


@dataclass(frozen=True, slots=True)
class _Copy:
    """A gold entity as a mention's sample holds it, as digests: of its record and of its pictures."""

    sample: str
    row: int
    record: bytes
    pictures: tuple[bytes, ...]


@dataclass(slots=True)
class _Findings:
    """What one shard told. pictures: digests by entity row, of a shard of the kb; copies: of a shard of mentions."""

    samples: int
    with_image: int
    num_pictures: int
    problems: list[Problem]
    records: dict[int, bytes]
    pictures: dict[int, tuple[bytes, ...]]
    copies: list[_Copy]


def verify_dataset(folder: Path, *, workers: int = 1, progress: Progress = no_progress) -> Verification:
    """Reads every byte of the dataset, in `workers` processes, and compares it with the manifest and with itself.

    Raises:
        UserError: there is no manifest, or it cannot be read or contradicts itself: nothing to compare with.
    """
    manifest, _ = read_manifest(folder)
    problems = _Bounded()
    problems.add(_check_rejects(folder, manifest))
    table_problems = _check_table(folder, manifest)
    problems.add(table_problems)
    has_table = _readable_table(folder) is not None
    parts = (KB, *SPLITS)
    tasks = [_Task(folder, shard, part, has_table) for part in parts for shard in manifest.shards_of(part)]
    records: dict[int, bytes] = {}
    pictures: dict[int, tuple[bytes, ...]] = {}
    with_image: Counter[str] = Counter()
    samples = num_pictures = 0
    add = counting(progress, "shards", len(tasks))
    for task, found in zip(tasks, map_tasks(_check_shard, tasks, workers), strict=True):
        records |= found.records
        pictures |= found.pictures
        problems.add(found.problems)
        problems.add(_check_copies(task.shard.path, found.copies, records, pictures))
        with_image[task.part] += found.with_image
        samples, num_pictures = samples + found.samples, num_pictures + found.num_pictures
        add(1)
    problems.add(_check_with_image(manifest, with_image))
    return Verification(len(tasks), samples, num_pictures, problems.count, tuple(problems.kept))


class _Bounded:
    def __init__(self) -> None:
        self.count, self.kept = 0, list[Problem]()

    def add(self, problems: Sequence[Problem]) -> None:
        self.count += len(problems)
        self.kept += problems[: MAX_PROBLEMS - len(self.kept)]


def _check_rejects(folder: Path, manifest: Manifest) -> list[Problem]:
    """The lines of rejects.jsonl by action and reason against the manifest's counts."""
    found: dict[str, Counter[str]] = {action: Counter() for action in _ACTIONS}
    problems = []
    try:
        with (folder / REJECTS_FILE).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    found[record["action"]][record["reason"]] += 1
                except (ValueError, KeyError, TypeError):
                    problems.append(Problem(REJECTS_FILE, None, f"line {number} is no finding of a preparation"))
    except FileNotFoundError:
        return [Problem(REJECTS_FILE, None, "the file is missing")]
    except UnicodeDecodeError:
        return [Problem(REJECTS_FILE, None, "the file is not UTF-8 text")]
    for action, section in _ACTIONS.items():
        counts: Mapping[str, int] = getattr(manifest, section)
        for reason in sorted({*counts, *found[action]}):
            lines_, said = found[action][reason], counts.get(reason, 0)
            if lines_ != said:
                what = f"{lines_} records {action} for {reason!r}, the manifest says {said}"
                problems.append(Problem(REJECTS_FILE, None, what))
    return problems


@lru_cache(2)
def _table(path: Path, modified: int) -> Any:
    """modified: so that another file at the same place is another table."""
    table = pq.read_table(path, memory_map=True)
    return table if table.schema.equals(ENTITY_SCHEMA) else None


def _readable_table(folder: Path) -> Any:
    """entities.parquet, or None when it cannot be used."""
    path = folder / ENTITIES_FILE
    try:
        return _table(path, path.stat().st_mtime_ns)
    except (pa.ArrowException, OSError):
        return None


def _check_table(folder: Path, manifest: Manifest) -> list[Problem]:
    path = folder / ENTITIES_FILE
    if not path.is_file():
        return [Problem(ENTITIES_FILE, None, "the file is missing")]
    problems = []
    if sha256_file(path) != manifest.entities_sha256:
        problems.append(Problem(ENTITIES_FILE, None, "its SHA-256 is not the manifest's"))
    table = _readable_table(folder)
    if table is None:
        return [*problems, Problem(ENTITIES_FILE, None, "it cannot be read as a table of entities")]
    if len(table) != manifest.entities:
        what = f"{len(table)} rows, the manifest says {manifest.entities} entities"
        problems.append(Problem(ENTITIES_FILE, None, what))
    for row, said in enumerate(table.column("entity_row").to_pylist()):
        if row != said:
            problems.append(Problem(ENTITIES_FILE, f"row {row}", f"its entity_row is {said}"))
    ids = Counter(table.column("entity_id").to_pylist())
    problems += [
        Problem(ENTITIES_FILE, f"entity {entity_id}", f"{count} rows have this entity_id")
        for entity_id, count in ids.items()
        if count > 1
    ]
    known = {shard.path for shard in manifest.shards_of(KB)}
    problems += [
        Problem(ENTITIES_FILE, None, f"names a shard that the manifest does not: {path!r}")
        for path in table.column("shard").unique().to_pylist()
        if path not in known
    ]
    return problems


def _check_with_image(manifest: Manifest, found: Mapping[str, int]) -> list[Problem]:
    said = {KB: manifest.entities_with_image} | {name: counts.with_image for name, counts in manifest.splits.items()}
    return [
        Problem("manifest.json", None, f"says that {count} of {part} have a picture; the shards hold {found[part]}")
        for part, count in said.items()
        if found[part] != count
    ]


def _check_shard(task: _Task) -> _Findings:
    """All that can be told of a shard by itself and by the table."""
    path, shard = task.folder / task.shard.path, task.shard
    found = _Findings(0, 0, 0, [], {}, {}, [])
    report = _Reporter(shard.path, found.problems)
    if not path.is_file():
        report("the shard is missing")
        return found
    size = path.stat().st_size
    if size != shard.bytes:
        report(f"{size} bytes, the manifest says {shard.bytes}")
    if sha256_file(path) != shard.sha256:
        report("its SHA-256 is not the manifest's")
    rows = _rows_of_shard(task) if task.part == KB and task.has_table else None
    last = "its start"
    try:
        with path.open("rb") as stream:
            for sample in read_shard(path):
                last = f"sample {sample.key}"
                found.samples += 1
                if task.part == KB:
                    record = None if rows is None else next(rows, None)
                    _check_entity(sample, record, rows is not None, stream, found, report)
                else:
                    _check_mention(sample, found, report)
    except UserError as error:
        report(f"cannot be read beyond {last} ({_reason(error)})")
    if found.samples != shard.samples:
        report(f"{found.samples} samples (up to {last}), the manifest says {shard.samples}")
    return found


class _Reporter:
    def __init__(self, file: str, problems: list[Problem]) -> None:
        self._file, self._problems = file, problems

    def __call__(self, what: str, sample: str | None = None) -> None:
        self._problems.append(Problem(self._file, sample, what))


def _rows_of_shard(task: _Task) -> Iterator[dict[str, Any]]:
    table = _readable_table(task.folder)
    for batch in table.filter(pc.equal(table.column("shard"), task.shard.path)).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _check_entity(
    sample: Sample,
    row: Mapping[str, Any] | None,
    has_rows: bool,
    stream: io.BufferedReader,
    found: _Findings,
    report: Callable[[str, str | None], None],
) -> None:
    """A sample of the kb against its row of the table, and its pictures at the places that the row gives."""
    record = _entity_record(sample, "", report)
    if record is None:
        return
    images = _entity_images(sample.fields, "")
    found.with_image += bool(images)
    for number, image in enumerate(images):
        _check_picture(image, f"{number}.jpg", sample.key, found, report)
    found.records[record["entity_row"]] = _digest(json_field(record))
    found.pictures[record["entity_row"]] = tuple(map(_digest, images))
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
    places = list(zip(row["image_offsets"] or [], row["image_sizes"] or [], strict=False))
    if len(places) != len(images):
        report(f"{len(images)} pictures, {ENTITIES_FILE} has places for {len(places)}", sample.key)
    for number, ((offset, size), image) in enumerate(zip(places, images, strict=False)):
        try:
            same = read_place(stream, offset, size) == image
        except UserError:
            same = False
        if not same:
            report(f"{number}.jpg does not lie where {ENTITIES_FILE} says ({offset} + {size})", sample.key)


def _check_mention(sample: Sample, found: _Findings, report: Callable[[str, str | None], None]) -> None:
    """A sample of a split by itself; its copy of the gold entity is kept as digests."""
    try:
        mention = read_mention(sample.fields, "")
    except UserError as error:
        report(_reason(error), sample.key)
        return
    if mention.image is not None:
        found.with_image += 1
        _check_picture(mention.image, "jpg", sample.key, found, report)
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
    found.num_pictures += len(images)
    digests = tuple(map(_digest, images))
    found.copies.append(_Copy(sample.key, record["entity_row"], _digest(json_field(record)), digests))


def _entity_record(sample: Sample, prefix: str, report: Callable[[str, str | None], None]) -> dict[str, Any] | None:
    """The record of an entity, whose pictures are all there and nothing else is; None when it cannot be used."""
    try:
        record = json.loads(sample.fields[f"{prefix}json"])
        text = {key: record[key] for key in _TEXT_COLUMNS}
        count = int(text["num_images"])
        hash(text["entity_row"])
    except (KeyError, TypeError, ValueError) as error:
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


def _check_copies(
    path: str, copies: Sequence[_Copy], records: Mapping[int, bytes], pictures: Mapping[int, tuple[bytes, ...]]
) -> list[Problem]:
    problems = []
    for copy in copies:
        if copy.row not in records:
            problems.append(Problem(path, copy.sample, f"its gold is row {copy.row}, which the kb does not have"))
            continue
        if copy.record != records[copy.row]:
            problems.append(Problem(path, copy.sample, f"entity.json is not the kb's record of row {copy.row}"))
        if copy.pictures != pictures[copy.row]:
            problems.append(Problem(path, copy.sample, f"its entity pictures are not the kb's of row {copy.row}"))
    return problems


def _check_picture(
    content: bytes, field: str, key: str, found: _Findings, report: Callable[[str, str | None], None]
) -> None:
    found.num_pictures += 1
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
            picture.load()
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
    """The part of a shard's error that tells more than its path."""
    text = str(error)
    return text[text.find("(") + 1 : text.rfind(")")] if "(" in text and ")" in text else text
