"""Tasks of a build: hash some files, make one shard. All that a task needs is in it or in the folder of the plan."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from data_prep.build.findings import finding_log, merged_counts
from data_prep.build.kb_table import KbRows, StoredEntity, entity_key, join_shifted, write_rows
from data_prep.build.plan import (
    FinishedChunk,
    FinishedShard,
    PlannedChunk,
    PlannedShard,
    read_finished,
    staged,
    write_finished,
    write_finished_chunk,
)
from data_prep.build.runners import Tick
from data_prep.build.staged_records import read_entities, read_mentions
from data_prep.formats.image_files import read_image
from data_prep.formats.release import Finding, RawEntity, RawImage, RawMention
from dsmip.data.image_preparation import UnusableImage, prepare_image
from dsmip.data.manifest import MAX_FILE_BYTES, ImageSettings, ShardInfo
from dsmip.data.records import NO_ROW, Entity, Mention, entity_fields, mention_fields
from dsmip.data.tar import Fields, WrittenShard, join_shards, read_span, write_shard
from dsmip.errors import UserError
from dsmip.storage.atomic import join_files, sha256_file

Note = Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class HashTask:
    """Hashes some files.

    Attributes:
        start: Position of the first one in a longer list.
        files: The files.
    """

    start: int
    files: tuple[Path, ...]

    def run(self, tick: Tick) -> tuple[int, list[bytes]]:
        """The start, and the SHA-256 of each file."""
        digests = []
        for path in self.files:
            digests.append(bytes.fromhex(sha256_file(path)))
            tick(1)
        return self.start, digests


@dataclass(frozen=True, slots=True)
class KbTask:
    """Makes a chunk of a kb shard.

    Attributes:
        out: The dataset's folder.
        chunk: What to make.
        images: How images are stored.
    """

    out: Path
    chunk: PlannedChunk
    images: ImageSettings

    def run(self, tick: Tick) -> FinishedChunk:
        """Writes the chunk, its rows of the kb's table, its findings, and that it is finished."""
        with finding_log(self.chunk.staged(self.out, "findings")) as log:
            written = write_shard(self.chunk.staged(self.out, "tar"), self._samples(log.note, tick))
            counts = log.counts
        write_rows(self.chunk.staged(self.out, "rows"), self._stored(written))
        num_with_image = sum(len(spans) > 1 for spans in written.spans)
        finished = FinishedChunk(self.chunk.path, self.chunk.number, written.end, num_with_image, counts)
        write_finished_chunk(self.out, finished)
        return finished

    def _samples(self, note: Note, tick: Tick) -> Iterator[tuple[str, Fields]]:
        for row, raw in enumerate(read_entities(self.chunk.staged(self.out, "records")), start=self.chunk.start):
            prepared = (_prepared(image, raw, self.images, note) for image in raw.images)
            images = tuple(image for image in prepared if image is not None)
            yield entity_key(row), entity_fields(Entity(row, raw.entity_id, raw.name, raw.attributes, images))
            tick(1)

    def _stored(self, written: WrittenShard) -> Iterator[StoredEntity]:
        raws = read_entities(self.chunk.staged(self.out, "records"))
        for row, (raw, spans) in enumerate(zip(raws, written.spans, strict=True), start=self.chunk.start):
            image_spans = tuple(spans[f"{number}.jpg"] for number in range(len(spans) - 1))
            yield StoredEntity(row, raw.entity_id, raw.name, raw.attributes, self.chunk.path, image_spans)


@dataclass(frozen=True, slots=True)
class JoinTask:
    """Makes a kb shard of its finished chunks, and removes them.

    Attributes:
        out: The dataset's folder.
        shard: What to make.
        chunks: The shard's chunks, in order.
    """

    out: Path
    shard: PlannedShard
    chunks: tuple[FinishedChunk, ...]

    def run(self, tick: Tick) -> FinishedShard:
        """Writes the shard, its rows of the kb's table, its findings, and that it is finished.

        Done once more by a cluster that took it for lost, it finds the shard.
        """
        if (finished := read_finished(self.out, self.shard)) is not None:
            return finished
        planned = self.shard.chunks
        ends = [chunk.end for chunk in self.chunks]
        tars = [chunk.staged(self.out, "tar") for chunk in planned]
        num_bytes, digest = join_shards(self.out / self.shard.path, zip(tars, ends, strict=True))
        rows = [chunk.staged(self.out, "rows") for chunk in planned]
        join_shifted(zip(rows, accumulate(ends, initial=0), strict=False), staged(self.out, self.shard.path, "rows"))
        findings = [chunk.staged(self.out, "findings") for chunk in planned]
        join_files(findings, staged(self.out, self.shard.path, "findings"))
        info = ShardInfo(path=self.shard.path, samples=self.shard.count, bytes=num_bytes, sha256=digest)
        num_with_image = sum(chunk.num_with_image for chunk in self.chunks)
        finished = FinishedShard(info, num_with_image, merged_counts(chunk.findings for chunk in self.chunks))
        write_finished(self.out, finished)
        for path in tars:
            path.unlink(missing_ok=True)
        return finished


@dataclass(frozen=True, slots=True)
class SplitTask:
    """Makes a shard of a section; images of gold entities are copied from the kb's shards, which are made before.

    Attributes:
        out: The dataset's folder.
        shard: What to make.
        images: How images are stored.
        kb: The kb's shards.
    """

    out: Path
    shard: PlannedShard
    images: ImageSettings
    kb: tuple[PlannedShard, ...]

    def run(self, tick: Tick) -> FinishedShard:
        """Writes the shard, its findings, and that it is finished."""
        with finding_log(staged(self.out, self.shard.path, "findings")) as log:
            written = write_shard(self.out / self.shard.path, self._samples(log.note, tick))
            counts = log.counts
        num_with_image = sum("jpg" in spans for spans in written.spans)
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
                entity = None if row == NO_ROW else self._entity(golds[row], kb, open_files)
                image = _prepared(raw.image, raw, self.images, note) if raw.image else None
                entity_id = raw.gold or "" if entity is None else entity.entity_id
                mention = Mention(raw.mention_id, raw.word, raw.sentence, entity_id, row, raw.groups, image)
                yield f"{self.shard.split}-{position:08d}", mention_fields(mention, entity)
                tick(1)

    def _entity(self, gold: StoredEntity, kb: dict[str, BinaryIO], open_files: ExitStack) -> Entity:
        """A gold entity with its images, from the kb's shards: these are opened into `kb` as they are needed."""
        if gold.image_spans and gold.shard not in kb:
            kb[gold.shard] = open_files.enter_context((self.out / gold.shard).open("rb"))
        images = tuple(read_span(kb[gold.shard], offset, size) for offset, size in gold.image_spans)
        return Entity(gold.entity_row, gold.entity_id, gold.name, gold.attributes, images)

    def _golds(self) -> dict[int, StoredEntity]:
        paths = tuple(staged(self.out, shard.path, "rows") for shard in self.kb)
        kb = KbRows(paths, tuple(shard.start for shard in self.kb))
        return kb.entities(row for _, row in read_mentions(self._records) if row != NO_ROW)


def _prepared(image: RawImage, owner: RawEntity | RawMention, settings: ImageSettings, note: Note) -> bytes | None:
    """The prepared image, or None and a finding."""
    reason = "picture ambiguous" if image.fits else "picture missing"
    if image.path is not None:
        try:
            return prepare_image(read_image(image, MAX_FILE_BYTES), settings)
        except UnusableImage as error:
            reason = str(error)
        except OSError as error:
            if image.member is None:  # it was read before, for the digest of the source: no fault of the release
                raise UserError(
                    f"{image.path}: cannot be read any more: {error.strerror}; run the command again to go on"
                ) from error
            reason = "picture unreadable"
    detail = f"{image.name} fits {image.fits}" if image.fits else image.name
    owner_id = owner.entity_id if isinstance(owner, RawEntity) else owner.mention_id
    note(Finding(owner.source, owner.record, reason, "degraded", detail, owner_id))
    return None
