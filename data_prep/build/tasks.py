"""The pieces of work of a build: make one shard, hash some files. All that a task needs is in it or in the stage."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from data_prep.build.findings import finding_log, merged_counts
from data_prep.build.images import UnusablePicture, prepare_picture
from data_prep.build.kb_table import KbPieces, StoredEntity, entity_key, join_moved, write_piece
from data_prep.build.plan import (
    FinishedPart,
    FinishedShard,
    PlannedPart,
    PlannedShard,
    read_finished,
    staged,
    write_finished,
    write_finished_part,
)
from data_prep.build.runners import Tick
from data_prep.build.staged_records import read_entities, read_mentions
from data_prep.formats.image_files import MAX_FILE_BYTES, read_picture
from data_prep.formats.release import Finding, RawEntity, RawMention, RawPicture
from dsmip.data.manifest import PictureSettings, ShardInfo
from dsmip.data.records import Entity, Mention, entity_fields, mention_fields
from dsmip.data.tar import Fields, WrittenShard, join_shards, read_place, write_shard
from dsmip.errors import UserError
from dsmip.storage.atomic import join_files, sha256_file

Note = Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class HashTask:
    """Digests of some files, which stand at `start` in a longer list."""

    start: int
    files: tuple[Path, ...]

    def run(self, tick: Tick) -> tuple[int, list[bytes]]:
        """The start, and the files' SHA-256."""
        digests = []
        for path in self.files:
            digests.append(bytes.fromhex(sha256_file(path)))
            tick(1)
        return self.start, digests


@dataclass(frozen=True, slots=True)
class KbTask:
    """Makes a part of a kb shard."""

    out: Path
    part: PlannedPart
    pictures: PictureSettings

    def run(self, tick: Tick) -> FinishedPart:
        """Writes the part, its rows of the kb's table, its findings, and that it is finished."""
        with finding_log(self.part.staged(self.out, "findings")) as log:
            written = write_shard(self.part.staged(self.out, "tar"), self._samples(log.note, tick))
            counts = log.counts
        write_piece(self.part.staged(self.out, "rows"), self._stored(written))
        num_with_image = sum(len(places) > 1 for places in written.places)
        finished = FinishedPart(self.part.path, self.part.number, written.end, num_with_image, counts)
        write_finished_part(self.out, finished)
        return finished

    def _samples(self, note: Note, tick: Tick) -> Iterator[tuple[str, Fields]]:
        for row, raw in enumerate(read_entities(self.part.staged(self.out, "records")), start=self.part.start):
            prepared = (_prepared(picture, raw, self.pictures, note) for picture in raw.pictures)
            images = tuple(image for image in prepared if image is not None)
            yield entity_key(row), entity_fields(Entity(row, raw.entity_id, raw.name, raw.attributes, images))
            tick(1)

    def _stored(self, written: WrittenShard) -> Iterator[StoredEntity]:
        raws = read_entities(self.part.staged(self.out, "records"))
        for row, (raw, places) in enumerate(zip(raws, written.places, strict=True), start=self.part.start):
            pictures = tuple(places[f"{number}.jpg"] for number in range(len(places) - 1))
            yield StoredEntity(row, raw.entity_id, raw.name, raw.attributes, self.part.path, pictures)


@dataclass(frozen=True, slots=True)
class JoinTask:
    """Makes a kb shard of its finished parts, and removes them."""

    out: Path
    shard: PlannedShard
    parts: tuple[FinishedPart, ...]

    def run(self, tick: Tick) -> FinishedShard:
        """Writes the shard, its rows of the kb's table, its findings, and that it is finished.

        Done once more by a cluster that took it for lost, it finds the shard.
        """
        if (finished := read_finished(self.out, self.shard)) is not None:
            return finished
        planned = self.shard.parts
        ends = [part.end for part in self.parts]
        tars = [part.staged(self.out, "tar") for part in planned]
        num_bytes, digest = join_shards(self.out / self.shard.path, zip(tars, ends, strict=True))
        rows = [part.staged(self.out, "rows") for part in planned]
        join_moved(zip(rows, accumulate(ends, initial=0), strict=False), staged(self.out, self.shard.path, "rows"))
        join_files(
            [part.staged(self.out, "findings") for part in planned], staged(self.out, self.shard.path, "findings")
        )
        info = ShardInfo(path=self.shard.path, samples=self.shard.count, bytes=num_bytes, sha256=digest)
        finished = FinishedShard(
            info, sum(part.num_with_image for part in self.parts), merged_counts(part.findings for part in self.parts)
        )
        write_finished(self.out, finished)
        for path in tars:
            path.unlink(missing_ok=True)
        return finished


@dataclass(frozen=True, slots=True)
class SplitTask:
    """Makes a shard of a split. Pictures of gold entities are copied from the kb's shards, which are made before."""

    out: Path
    shard: PlannedShard
    pictures: PictureSettings
    kb: tuple[PlannedShard, ...]

    def run(self, tick: Tick) -> FinishedShard:
        """Writes the shard, its findings, and that it is finished."""
        with finding_log(staged(self.out, self.shard.path, "findings")) as log:
            written = write_shard(self.out / self.shard.path, self._samples(log.note, tick))
            counts = log.counts
        num_with_image = sum("jpg" in places for places in written.places)
        info = ShardInfo(path=self.shard.path, samples=written.samples, bytes=written.bytes, sha256=written.sha256)
        finished = FinishedShard(info, num_with_image, counts)
        write_finished(self.out, finished)
        return finished

    @property
    def _records(self) -> Path:
        return staged(self.out, self.shard.path, "records")

    def _samples(self, note: Note, tick: Tick) -> Iterator[tuple[str, Fields]]:
        golds = self._golds()
        with ExitStack() as open_files:
            kb: dict[str, BinaryIO] = {}
            for position, (raw, row) in enumerate(read_mentions(self._records), start=self.shard.start):
                gold = golds[row]
                if gold.places and gold.shard not in kb:
                    kb[gold.shard] = open_files.enter_context((self.out / gold.shard).open("rb"))
                images = tuple(read_place(kb[gold.shard], offset, size) for offset, size in gold.places)
                entity = Entity(row, gold.entity_id, gold.name, gold.attributes, images)
                image = _prepared(raw.picture, raw, self.pictures, note) if raw.picture else None
                mention = Mention(raw.mention_id, raw.word, raw.sentence, gold.entity_id, row, raw.groups, image)
                yield f"{self.shard.split}-{position:08d}", mention_fields(mention, entity)
                tick(1)

    def _golds(self) -> dict[int, StoredEntity]:
        paths = tuple(staged(self.out, shard.path, "rows") for shard in self.kb)
        pieces = KbPieces(paths, tuple(shard.start for shard in self.kb))
        return pieces.entities(row for _, row in read_mentions(self._records))


def _prepared(
    picture: RawPicture, owner: RawEntity | RawMention, settings: PictureSettings, note: Note
) -> bytes | None:
    """The prepared picture, or None and a finding."""
    reason = "picture missing"
    if picture.path is not None:
        try:
            return prepare_picture(read_picture(picture, MAX_FILE_BYTES), settings)
        except UnusablePicture as error:
            reason = str(error)
        except OSError as error:
            if picture.member is None:  # it was read before, for the digest of the source: no fault of the release
                raise UserError(
                    f"{picture.path}: cannot be read any more: {error.strerror}; run the command again to go on"
                ) from error
            reason = "picture unreadable"
    detail = picture.name.encode("utf-8", "replace").decode()
    note(Finding(owner.source, owner.record, reason, "degraded", detail))
    return None
