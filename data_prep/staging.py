"""The plan of a build, on disk: which shard holds which records, checked, and which shards are finished.

<data>/.unfinished/<shard>.records   the records of one shard to make, a JSON line each
<data>/.unfinished/plan.json         the shards and what was found while reading; written last
<data>/.unfinished/<shard>.done      what a finished shard became; written after the shard itself
<data>/.unfinished/<shard>.findings  what was found while making it
<data>/.unfinished/<shard>.rows      its rows of the kb's table (kb shards)

The folder is there until the manifest is: a build that stopped anywhere goes on from the shards that are finished.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from data_prep.release import Finding, RawEntity, RawMention, RawPicture, Release, checked_entities, checked_mentions
from dsmip.errors import UserError
from dsmip.files import atomic_path, sha256_file, write_json
from dsmip.manifest import KB, SPLITS, PictureSettings, ShardInfo, shard_path
from dsmip.streams import permutation

STAGE = ".unfinished"
PLAN_FILE = "plan.json"
SCAN_FINDINGS = "scan.findings"

MAX_MENTIONS_PER_SHARD = 1000
MIN_TRAIN_SHARDS = 16
_BLOCK = 512  # of a tar: each member takes a header and is rounded up

Counts = dict[str, dict[str, int]]  # action: {reason: count}
Scanned = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to make: path below the dataset's folder, the position of its first record in its part, how many."""

    path: str
    start: int
    count: int

    @property
    def part(self) -> str:
        """`kb` or the split."""
        return self.path.split("/")[0]


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What a planned shard became."""

    info: ShardInfo
    num_with_image: int
    findings: Counts


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards, in order, and what reading the release found."""

    shards: tuple[PlannedShard, ...]
    findings: Counts

    def of(self, *parts: str) -> list[PlannedShard]:
        """The shards of some parts."""
        return [shard for shard in self.shards if shard.part in parts]


class FindingLog:
    """Findings as lines of a file, and how many there are of each kind."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._counts: Counter[tuple[str, str]] = Counter()

    def note(self, finding: Finding) -> None:
        """Adds one."""
        self._stream.write(json.dumps(asdict(finding), sort_keys=True, ensure_ascii=False) + "\n")
        self._counts[finding.action, finding.reason] += 1

    @property
    def counts(self) -> Counts:
        """By action and reason."""
        return merged_counts([{action: {reason: count}} for (action, reason), count in self._counts.items()])


@contextmanager
def finding_log(path: Path) -> Iterator[FindingLog]:
    """A log that appears, whole, when the block ends without an error."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield FindingLog(stream)


def merged_counts(counts: Iterable[Counts]) -> Counts:
    """Sums by action and reason, sorted."""
    sums: dict[str, Counter[str]] = {}
    for one in counts:
        for action, reasons in one.items():
            sums.setdefault(action, Counter()).update(reasons)
    return {action: dict(sorted(reasons.items())) for action, reasons in sorted(sums.items())}


def staged(out: Path, shard: str, suffix: str) -> Path:
    """The file of that kind for a shard."""
    return out / STAGE / f"{Path(shard).stem}.{suffix}"


def make_plan(
    source: Release,
    out: Path,
    *,
    key: str,
    pictures: PictureSettings,
    shard_bytes: int,
    seed: int,
    scanned: Scanned = lambda part, count: None,
) -> Plan:
    """Reads the release once and writes the records of every shard, then the plan. `key` names what it is a plan of.

    Memory: the entity ids, and eight bytes per mention.

    Raises:
        UserError: the release is wrong or has no usable entity.
    """
    (out / STAGE).mkdir(parents=True, exist_ok=True)
    with finding_log(out / STAGE / SCAN_FINDINGS) as log:
        row_of: dict[str, int] = {}

        def noted(entities: Iterable[RawEntity]) -> Iterator[RawEntity]:
            for entity in entities:
                scanned(KB, len(row_of))
                row_of[entity.entity_id] = len(row_of)
                yield entity

        shards = _stage_kb(out, noted(checked_entities(source.entities(), log.note)), pictures, shard_bytes)
        if not row_of:
            reasons = ", ".join(f"{reason} {count}" for reason, count in log.counts.get("rejected", {}).items())
            raise UserError(
                f"{source.folder}: no usable entity; " + (f"rejected: {reasons}" if reasons else "it is empty")
            )
        for split in SPLITS:
            mentions = checked_mentions(source.mentions(split), row_of, log.note)
            rows = ((mention, row_of[mention.gold or ""]) for mention in mentions)
            shards += _stage_split(out, split, rows, seed, scanned)
        counts = log.counts
    plan = Plan(tuple(shards), counts)
    write_json(out / STAGE / PLAN_FILE, {"key": key, "shards": [asdict(shard) for shard in shards], "findings": counts})
    return plan


def read_plan(out: Path, key: str) -> Plan | None:
    """The plan in the folder, if there is one of that key."""
    path = out / STAGE / PLAN_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    if content["key"] != key:
        return None
    return Plan(tuple(PlannedShard(**shard) for shard in content["shards"]), content["findings"])


def staged_entities(out: Path, shard: PlannedShard) -> Iterator[RawEntity]:
    """The entities of a kb shard."""
    for source, record, entity_id, name, attributes, pictures in _lines(staged(out, shard.path, "records")):
        yield RawEntity(source, record, entity_id, name, attributes, tuple(map(_picture, pictures)))


def staged_mentions(out: Path, shard: PlannedShard) -> Iterator[tuple[RawMention, int]]:
    """The mentions of a split's shard, each with its gold's kb row."""
    for source, record, mention_id, word, sentence, gold, groups, picture, row in _lines(
        staged(out, shard.path, "records")
    ):
        raw = RawMention(source, record, mention_id, word, sentence, gold, groups, picture and _picture(picture))
        yield raw, row


def write_finished(out: Path, finished: FinishedShard) -> None:
    """Marks a shard as finished."""
    content = {
        "info": finished.info.model_dump(),
        "num_with_image": finished.num_with_image,
        "findings": finished.findings,
    }
    write_json(staged(out, finished.info.path, "done"), content)


def read_finished(out: Path, shard: PlannedShard) -> FinishedShard | None:
    """What a shard became, if it is finished and its file is still what it was."""
    path = staged(out, shard.path, "done")
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    info = ShardInfo.model_validate(content["info"])
    tar = out / shard.path
    if not tar.is_file() or tar.stat().st_size != info.bytes or sha256_file(tar) != info.sha256:
        return None
    return FinishedShard(info, content["num_with_image"], content["findings"])


def _stage_kb(
    out: Path, entities: Iterable[RawEntity], pictures: PictureSettings, shard_bytes: int
) -> list[PlannedShard]:
    """Shards of about `shard_bytes`, by what the pictures will take at most, more or less."""
    shards: list[PlannedShard] = []
    remaining = iter(entities)
    start, entity = 0, next(remaining, None)
    while entity is not None:
        path, count, size = shard_path(KB, len(shards)), 0, 0
        with _writing(staged(out, path, "records")) as stream:
            while entity is not None and (count == 0 or size < shard_bytes):
                _write_line(stream, _entity_line(entity))
                count, size, entity = count + 1, size + _stored_size(entity, pictures), next(remaining, None)
        shards.append(PlannedShard(path, start, count))
        start += count
    return shards


def _stored_size(entity: RawEntity, pictures: PictureSettings) -> int:
    """Bytes in a shard, roughly: a picture of s x s pixels takes about s * s / 3."""
    limit = pictures.size**2 // 3
    sizes = [min(picture.size, limit) for picture in entity.pictures if picture.path]
    return len(entity.name) + len(entity.attributes) + sum(sizes) + 2 * _BLOCK * (1 + len(sizes))


def _stage_split(
    out: Path, split: str, mentions: Iterable[tuple[RawMention, int]], seed: int, scanned: Scanned
) -> list[PlannedShard]:
    """Training mentions are shuffled once, so that a window of shards is a fair sample; the others keep their order."""
    spool, offsets = out / STAGE / f"{split}.spool", array("q")
    with spool.open("w", encoding="ascii") as stream:
        offset = 0
        for mention, row in mentions:
            scanned(split, len(offsets))
            offsets.append(offset)
            offset += _write_line(stream, [*_mention_line(mention), row])
    is_train = split == "train"
    order: Sequence[int] = permutation(len(offsets), "build", seed).tolist() if is_train else range(len(offsets))
    shards = []
    with spool.open("rb") as lines:
        for index, positions in enumerate(
            _cut(len(offsets), MAX_MENTIONS_PER_SHARD, MIN_TRAIN_SHARDS if is_train else 1)
        ):
            path = shard_path(split, index)
            with atomic_path(staged(out, path, "records")) as temporary, temporary.open("wb") as stream_of_shard:
                for position in positions:
                    lines.seek(offsets[order[position]])
                    stream_of_shard.write(lines.readline())
            shards.append(PlannedShard(path, positions.start, len(positions)))
    spool.unlink()
    return shards


def _cut(count: int, max_size: int, min_parts: int) -> list[range]:
    """`count` items in parts of nearly equal size: none above `max_size`, at least `min_parts` where counts allow."""
    num_parts = max(-(-count // max_size), min(min_parts, count))
    bounds = [count * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [range(start, stop) for start, stop in pairwise(bounds)]


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as stream:
        yield stream


def _write_line(stream: TextIO, value: list[Any]) -> int:
    return stream.write(json.dumps(value) + "\n")


def _lines(path: Path) -> Iterator[list[Any]]:
    with path.open(encoding="ascii") as stream:
        yield from map(json.loads, stream)


def _entity_line(raw: RawEntity) -> list[Any]:
    return [raw.source, raw.record, raw.entity_id, raw.name, raw.attributes, [*map(_picture_line, raw.pictures)]]


def _mention_line(raw: RawMention) -> list[Any]:
    picture = _picture_line(raw.picture) if raw.picture else None
    return [raw.source, raw.record, raw.mention_id, raw.word, raw.sentence, raw.gold, dict(raw.groups), picture]


def _picture_line(raw: RawPicture) -> list[Any]:
    # Absolute: who builds the shard may work in another folder.
    return [raw.name, str(raw.path.absolute()) if raw.path else None, raw.member, raw.size]


def _picture(line: list[Any]) -> RawPicture:
    name, path, member, size = line
    return RawPicture(name, Path(path) if path else None, member, size)
