"""One shard from one task: everything a task needs is in it, so tasks run anywhere that sees the files."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.pictures import UnusablePicture, prepare_picture
from data_prep.release import Finding, RawEntity, RawMention, RawPicture
from dsmip.manifest import ShardInfo
from dsmip.records import Entity, Mention
from dsmip.samples import entity_fields, mention_fields
from dsmip.tars import Fields, WrittenShard, read_place, write_shard


@dataclass(frozen=True, slots=True)
class StoredEntity:
    """An entity as it lies in the kb: its text, its shard, and (offset, size) of each picture there."""

    entity_row: int
    entity_id: str
    name: str
    attributes: str
    shard: str
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """What a task made; `entities` is empty for a shard of mentions."""

    info: ShardInfo
    num_with_image: int
    findings: tuple[Finding, ...]
    entities: tuple[StoredEntity, ...] = ()


@dataclass(frozen=True, slots=True)
class KbTask:
    """Makes the kb shard `path` of `entities`, the first of which is kb row `start`."""

    folder: Path
    path: str
    start: int
    entities: tuple[RawEntity, ...]
    image_size: int

    def build(self) -> BuiltShard:
        """Writes the shard."""
        findings: list[Finding] = []
        written = write_shard(self.folder / self.path, self._samples(findings))
        stored = []
        for row, (raw, places) in enumerate(zip(self.entities, written.places, strict=True), start=self.start):
            pictures = tuple(places[f"{number}.jpg"] for number in range(len(places) - 1))
            stored.append(StoredEntity(row, raw.entity_id, raw.name, raw.attributes, self.path, pictures))
        num_with_image = sum(bool(entity.places) for entity in stored)
        return BuiltShard(_info(self.path, written), num_with_image, tuple(findings), tuple(stored))

    def _samples(self, findings: list[Finding]) -> Iterator[tuple[str, Fields]]:
        for row, raw in enumerate(self.entities, start=self.start):
            prepared = (_prepared(picture, raw, self.image_size, findings) for picture in raw.pictures)
            images = tuple(image for image in prepared if image is not None)
            entity = Entity(row, raw.entity_id, raw.name, raw.attributes, images)
            yield entity_key(row), entity_fields(entity)


@dataclass(frozen=True, slots=True)
class SplitTask:
    """Makes the shard `path` of a split; `start` is the position of its first mention in the split.

    Pictures of gold entities are copied from the kb's shards, which are made before.
    """

    folder: Path
    path: str
    start: int
    mentions: tuple[tuple[RawMention, StoredEntity], ...]
    image_size: int

    def build(self) -> BuiltShard:
        """Writes the shard."""
        findings: list[Finding] = []
        written = write_shard(self.folder / self.path, self._samples(findings))
        num_with_image = sum("jpg" in places for places in written.places)
        return BuiltShard(_info(self.path, written), num_with_image, tuple(findings))

    def _samples(self, findings: list[Finding]) -> Iterator[tuple[str, Fields]]:
        split = self.path.split("/")[0]
        with ExitStack() as open_files:
            kb: dict[str, BinaryIO] = {}
            for position, (raw, gold) in enumerate(self.mentions, start=self.start):
                if gold.places and gold.shard not in kb:
                    kb[gold.shard] = open_files.enter_context((self.folder / gold.shard).open("rb"))
                images = tuple(read_place(kb[gold.shard], offset, size) for offset, size in gold.places)
                entity = Entity(gold.entity_row, gold.entity_id, gold.name, gold.attributes, images)
                image = _prepared(raw.picture, raw, self.image_size, findings) if raw.picture else None
                mention = Mention(
                    raw.mention_id, raw.word, raw.sentence, gold.entity_id, gold.entity_row, raw.groups, image
                )
                yield f"{split}-{position:08d}", mention_fields(mention, entity)


ShardTask = KbTask | SplitTask


def build_shard(task: ShardTask) -> BuiltShard:
    """Does one task (a plain function, for mapping)."""
    return task.build()


def entity_key(row: int) -> str:
    """Key of an entity's sample in the kb's shards."""
    return f"{row:08d}"


def _info(path: str, written: WrittenShard) -> ShardInfo:
    return ShardInfo(path=path, samples=written.samples, bytes=written.bytes, sha256=written.sha256)


def _prepared(
    picture: RawPicture, owner: RawEntity | RawMention, image_size: int, findings: list[Finding]
) -> bytes | None:
    """The prepared picture, or None and a finding."""
    reason = "picture missing"
    if picture.path is not None:
        try:
            return prepare_picture(picture.path.read_bytes(), image_size)
        except UnusablePicture as error:
            reason = str(error)
        except OSError:
            reason = "picture unreadable"
    detail = picture.name.encode("utf-8", "replace").decode()
    findings.append(Finding(owner.source, owner.record, reason, "degraded", detail))
    return None
