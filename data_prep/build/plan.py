"""The plan of a build, on disk: which shard holds which records, checked, and which shards are finished.

<data>/.unfinished/<chunk>.records   the records of a chunk of a shard to make, a JSON line each
<data>/.unfinished/plan.json         the shards and what was found while reading; written last
<data>/.unfinished/<chunk>.tar       a chunk of a kb shard, with <chunk>.rows of the kb's table, <chunk>.findings and,
                                     written last, <chunk>.done
<data>/.unfinished/<shard>.done      what a finished shard became, written after the shard itself; with <shard>.findings
                                     and, of a kb shard, <shard>.rows

A chunk of a kb shard has at most 1,000 records; splits have small shards, which are made whole. The folder is there
until the manifest is: a build that stopped anywhere goes on from the chunks and shards that are finished.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.build.findings import Counts, ImageCount, finding_log
from data_prep.build.mention_shards import MentionSpool
from data_prep.build.rules import UniqueIds, checked_entities, checked_mentions
from data_prep.build.staged_records import write_entity
from data_prep.formats.release import RawEntity, RawMention, Release
from dsmip.data.image_preparation import IMAGES
from dsmip.data.manifest import KB, SPLITS, UNKNOWN_OF, ImageSettings, ShardInfo, shard_path
from dsmip.data.records import NO_ROW
from dsmip.errors import UserError
from dsmip.storage.atomic import atomic_path, sha256_file, write_json

STAGE = ".unfinished"
PLAN_FILE = "plan.json"
SCAN_FINDINGS = "scan.findings"

MAX_RECORDS_PER_CHUNK = 1000
SHARD_BYTES = 256_000_000

_BLOCK = 512  # of a tar: each member takes a header and is rounded up

Scanned = Callable[[str, int], None]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """How a dataset directory is made, and what its manifest says about where it is from.

    Attributes:
        name: Its name.
        licence: Its licence.
        images: How images are stored.
        shard_bytes: About the size of the kb's shards.
        seed: Orders the training mentions.
        keep_nil: Keep mentions that have no gold in the kb.
    """

    name: str
    licence: str = "unknown"
    images: ImageSettings = IMAGES
    shard_bytes: int = SHARD_BYTES
    seed: int = 0
    keep_nil: bool = False


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to make.

    Attributes:
        path: Its path below the dataset's folder.
        start: Position of its first record.
        count: How many records it has.
    """

    path: str
    start: int
    count: int

    @property
    def split(self) -> str:
        """`kb` or the section."""
        return self.path.split("/")[0]

    @property
    def chunks(self) -> "list[PlannedChunk]":
        """Its chunks, in order."""
        starts = range(0, self.count, MAX_RECORDS_PER_CHUNK)
        return [
            PlannedChunk(self.path, number, self.start + start, min(MAX_RECORDS_PER_CHUNK, self.count - start))
            for number, start in enumerate(starts)
        ]


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """Some records of a shard.

    Attributes:
        path: The shard's path.
        number: Which chunk of it, from 0.
        start: Position of the first record.
        count: How many records.
    """

    path: str
    number: int
    start: int
    count: int

    def staged(self, out: Path, suffix: str) -> Path:
        """The chunk's file of a kind."""
        return staged(out, self.path, f"{self.number:04d}.{suffix}")


@dataclass(frozen=True, slots=True)
class FinishedChunk:
    """A chunk that is made.

    Attributes:
        path: The shard's path.
        number: Which chunk of it, from 0.
        end: Where its samples end in its tar, in bytes.
        num_with_image: How many of its entities have an image.
        findings: What was found while it was made.
    """

    path: str
    number: int
    end: int
    num_with_image: int
    findings: Counts


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that is made.

    Attributes:
        info: What the manifest says of it.
        num_with_image: How many of its records have an image.
        findings: What was found while it was made.
    """

    info: ShardInfo
    num_with_image: int
    findings: Counts


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards of a dataset.

    Attributes:
        shards: In order.
        findings: What was found while the release was read.
    """

    shards: tuple[PlannedShard, ...]
    findings: Counts

    def of(self, *splits: str) -> list[PlannedShard]:
        """The shards of the kb or of some sections."""
        return [shard for shard in self.shards if shard.split in splits]


def staged(out: Path, shard: str, suffix: str) -> Path:
    """The staged file of a kind, for a shard."""
    return out / STAGE / f"{Path(shard).stem}.{suffix}"


def make_plan(
    source: Release,
    out: Path,
    *,
    key: str,
    options: DatasetOptions,
    scanned: Scanned = lambda split, count: None,
    warn: Warn = lambda line: None,
) -> Plan:
    """Reads the release once and writes the records of every shard, then the plan.

    Memory holds the ids of entities and mentions, and what the release holds itself.

    Args:
        source: The release.
        out: The dataset's folder.
        key: Names what it is a plan of.
        options: How the dataset is made.
        scanned: Called with the kb or a split and the number of its records that were read so far.
        warn: Gets a line where most of the images that records name were not found.

    Raises:
        UserError: The release is wrong, has no usable entity, or all of its mentions were rejected.
    """
    (out / STAGE).mkdir(parents=True, exist_ok=True)
    with finding_log(out / STAGE / SCAN_FINDINGS) as log:
        row_of: dict[str, int] = {}

        def noted(entities: Iterable[RawEntity]) -> Iterator[RawEntity]:
            for entity in entities:
                scanned(KB, len(row_of))
                row_of[entity.entity_id] = len(row_of)
                yield entity

        count = ImageCount("entities")
        shards = _stage_kb(out, noted(checked_entities(count.counted(source.entities()), log.note)), options)
        before = Counter(log.counts.get("rejected", {}))
        if not row_of:
            rejected = _reasons(before)
            raise UserError(f"{source.folder}: no usable entity; {rejected or 'it is empty'}")
        warnings = [count.warning(source.folder)]
        ids = UniqueIds()
        for split in SPLITS:
            count = ImageCount(f"mentions of {split}")
            counted = count.counted(source.mentions(split))
            mentions = checked_mentions(counted, row_of, log.note, ids, keep_nil=options.keep_nil)
            rows = ((mention, row_of.get(mention.gold or "", NO_ROW)) for mention in mentions)
            shards += _stage_split(out, split, rows, options.seed, scanned)
            warnings.append(count.warning(source.folder))
        counts = log.counts
    rejected = _reasons(Counter(counts.get("rejected", {})) - before)
    if rejected and not any(shard.count for shard in shards if shard.split != KB):
        raise UserError(f"{source.folder}: no usable mention; {rejected} (see {out / STAGE / SCAN_FINDINGS})")
    for line in filter(None, warnings):
        warn(line)
    plan = Plan(tuple(shards), counts)
    write_json(out / STAGE / PLAN_FILE, {"key": key, "shards": [asdict(shard) for shard in shards], "findings": counts})
    return plan


def _reasons(rejected: Mapping[str, int]) -> str:
    shown = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f"rejected: {shown}" if shown else ""


def read_plan(out: Path, key: str) -> Plan | None:
    """The plan in the folder, if there is one of that key."""
    path = out / STAGE / PLAN_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # cut short by a crash of the machine
        return None
    if content["key"] != key:
        return None
    return Plan(tuple(PlannedShard(**shard) for shard in content["shards"]), content["findings"])


def write_finished_chunk(out: Path, finished: FinishedChunk) -> None:
    """Marks a chunk as finished."""
    write_json(staged(out, finished.path, f"{finished.number:04d}.done"), asdict(finished))


def read_finished_chunk(out: Path, chunk: PlannedChunk) -> FinishedChunk | None:
    """A chunk, if it is finished and its tar is still there."""
    tar = chunk.staged(out, "tar")
    content = _read_done(chunk.staged(out, "done"))
    if content is None or not tar.is_file() or tar.stat().st_size < content["end"]:
        return None
    return FinishedChunk(**content)


def write_finished(out: Path, finished: FinishedShard) -> None:
    """Marks a shard as finished."""
    content = {
        "info": finished.info.model_dump(),
        "num_with_image": finished.num_with_image,
        "findings": finished.findings,
    }
    write_json(staged(out, finished.info.path, "done"), content)


def read_finished(out: Path, shard: PlannedShard) -> FinishedShard | None:
    """A shard, if it is finished and its file is still what it was."""
    content = _read_done(staged(out, shard.path, "done"))
    if content is None:
        return None
    info = ShardInfo.model_validate(content["info"])
    tar = out / shard.path
    if not tar.is_file() or tar.stat().st_size != info.bytes or sha256_file(tar) != info.sha256:
        return None
    return FinishedShard(info, content["num_with_image"], content["findings"])


def _read_done(path: Path) -> dict[str, Any] | None:
    """The content of a .done file; None where there is none, or one that a power cut left empty."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content


def _stage_kb(out: Path, entities: Iterable[RawEntity], options: DatasetOptions) -> list[PlannedShard]:
    """Shards of about `shard_bytes`, by what the images will take at most, more or less."""
    shards: list[PlannedShard] = []
    remaining = iter(entities)
    entity = next(remaining, None)
    start = 0
    while entity is not None:
        path, count, size = shard_path(KB, len(shards)), 0, 0
        while entity is not None and (count == 0 or size < options.shard_bytes):
            chunk = PlannedChunk(path, count // MAX_RECORDS_PER_CHUNK, start + count, MAX_RECORDS_PER_CHUNK)
            with atomic_path(chunk.staged(out, "records")) as path_now, path_now.open("w", encoding="ascii") as stream:
                for _ in range(MAX_RECORDS_PER_CHUNK):
                    write_entity(stream, entity)
                    count, size, entity = count + 1, size + _stored_size(entity, options.images), next(remaining, None)
                    if entity is None or size >= options.shard_bytes:
                        break
        shards.append(PlannedShard(path, start, count))
        start += count
    return shards


def _stored_size(entity: RawEntity, settings: ImageSettings) -> int:
    """Bytes in a shard, roughly: an image of s x s pixels that is encoded again takes about s * s / 3."""
    limit = settings.size**2 // 3
    sizes = [image.size if settings.keep_original else min(image.size, limit) for image in entity.images if image.path]
    return len(entity.name) + len(entity.attributes) + sum(sizes) + 2 * _BLOCK * (1 + len(sizes))


def _stage_split(
    out: Path, split: str, mentions: Iterable[tuple[RawMention, int]], seed: int, scanned: Scanned
) -> list[PlannedShard]:
    """Shards of the split's mentions, then of those that have no gold in the kb."""
    shards: list[PlannedShard] = []
    with MentionSpool(out / STAGE / "known.spool") as known, MentionSpool(out / STAGE / "unknown.spool") as unknown:
        for mention, row in mentions:
            scanned(split, len(known) + len(unknown))
            (unknown if row == NO_ROW else known).add(mention, row)
        for section, spool in ((split, known), (UNKNOWN_OF[split], unknown)):
            cut = spool.write_shards(section, seed, partial(staged, out, suffix="records"))
            shards += [PlannedShard(path, positions.start, len(positions)) for path, positions in cut]
    return shards
