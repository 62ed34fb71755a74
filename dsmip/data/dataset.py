"""The dataset directory: the records of a prepared release, streamed from tar shards, and how they are laid out there.

It lies in a folder or, with copies on each node, in an object store: see `dsmip.storage.dataset_storage`.

<data>/manifest.json               see dsmip.data.manifest
<data>/kb/entities.parquet         one row per entity, with the position of each image in the kb's shards
<data>/kb/kb-000000.tar            <row>.json, <row>.0.jpg, <row>.1.jpg ...
<data>/<split>/<split>-000000.tar  <key>.json, <key>.jpg, <key>.entity.json, <key>.entity.0.jpg ...
<data>/<split>-unknown/...         the same without an entity: mentions that have no gold in the kb, if kept
<data>/rejects.jsonl               what was left out, repaired or degraded
"""

import hashlib
from bisect import bisect_left
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from dsmip.data.manifest import (
    ENTITIES_FILE,
    KB,
    TRAIN,
    UNKNOWN_OF,
    Manifest,
    ShardInfo,
    View,
    parse_manifest,
    parse_view,
)
from dsmip.data.records import ENTITY_SCHEMA, Entity, Mention, make_entity, read_mention, read_pair
from dsmip.data.sampler import Window, count_steps, step_bounds, windows
from dsmip.data.tar import Sample, read_samples, read_span
from dsmip.errors import UserError
from dsmip.storage.dataset_storage import MANIFEST_FILE, DatasetStorage, open_file
from dsmip.storage.locations import open_dataset_storage

_TEXT_COLUMNS = ["entity_row", "entity_id", "name", "attributes", "num_images"]
_TEXT_FIELDS, _ROWS_AT_ONCE, _WINDOWS_AHEAD = ("json",), 1024, 1

Shards = Sequence[tuple[ShardInfo, Sequence[int]]]  # with the indices of their samples
Positions = dict[int, dict[int, int]]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One rank's share of a step; entities[i] is the gold of mentions[i] and carries at most one picture."""

    step: int
    mentions: list[Mention]
    entities: list[Entity]


class Dataset:
    """A prepared release. Open it with `Dataset.open`; reading is lazy and every record comes from the files.

    Attributes:
        manifest_hash: SHA-256 of manifest.json: equal hashes mean equal data.
        kept: Of a view, by split the positions of its mentions in the whole split, ascending.
        own: The files beside the manifest.
        files: Those of the shards: of a view, of the dataset that it is a view of, see `dsmip.data.manifest`.
    """

    def __init__(
        self,
        own: DatasetStorage,
        manifest: Manifest,
        manifest_hash: str,
        view: View | None = None,
        files: DatasetStorage | None = None,
    ) -> None:
        self.own, self.manifest, self.manifest_hash, self.files = own, manifest, manifest_hash, files or own
        self.kept: Mapping[str, list[int]] = {TRAIN: view.rows()} if view else {}
        self._held = dict[str, list[Mention]]()

    @classmethod
    def open(cls, location: str | Path) -> "Dataset":
        """Opens a dataset directory, or the URI of one in an object store.

        In a folder, files are checked to be there with the right sizes; those of a store are when they are fetched.

        Raises:
            UserError: there is nothing, or no complete dataset.
        """
        own, content = open_dataset_storage(location)
        view = parse_view(content, own.address(MANIFEST_FILE))
        files = own
        if view:
            view_hash = hashlib.sha256(content).hexdigest()
            files, content = open_dataset_storage(own.relative(view.view_of))
        manifest, manifest_hash = parse_manifest(content, files.address(MANIFEST_FILE))
        if view and manifest_hash != view.base_sha256:
            raise UserError(f"{location}: is a view of {files.location}, which has changed; make the view again")
        files.check_sizes([*manifest.shards, manifest.entities_file])
        if view:
            return cls(own, view.applied(manifest), view_hash, view, files)
        return cls(own, manifest, manifest_hash)

    @property
    def location(self) -> str:
        """What it is opened by on any node: the folder's absolute path, or the URI."""
        return self.own.location

    @property
    def folder(self) -> Path:
        """Where its files lie on this node: its folder, or that of their copies."""
        return self.own.folder

    @property
    def num_entities(self) -> int:
        """Entities in the kb."""
        return self.manifest.entities

    def num_mentions(self, split: str) -> int:
        """Mentions of a split, or of another section (`dsmip.data.manifest.SECTIONS`)."""
        return self.manifest.num_mentions(split)

    def unknown_mentions(self, split: str) -> Iterator[Mention]:
        """Mentions of a split that have no gold in the kb (`entity_row` -1), where they were kept, in shard order.

        No other method counts or reads them for the split: nothing trains on them or ranks them. Errors are those of
        `mentions`.
        """
        return self.mentions(UNKNOWN_OF.get(split, split))

    def num_steps(self, split: str, batch_size: int) -> int:
        """Steps of an epoch over a split: ceil(mentions / batch_size)."""
        return count_steps(self.num_mentions(split), batch_size)

    def entity_texts(self) -> pa.Table:
        """All entities' entity_row, entity_id, name, attributes and num_images, in row order."""
        return self._kb.select(_TEXT_COLUMNS)

    def entities(self, rows: Sequence[int] | None = None) -> Iterator[Entity]:
        """Entities with all their pictures, in the order of `rows` (default: the whole kb); pictures are streamed.

        Ascending rows open each shard once.

        Raises:
            IndexError: a row is outside the kb.
            UserError: a shard is missing or damaged.
        """
        rows = range(self.num_entities) if rows is None else rows
        if rows and not (min(rows) >= 0 and max(rows) < self.num_entities):
            raise IndexError(f"entity rows {min(rows)} .. {max(rows)} outside a kb of {self.num_entities}")
        open_path, stream = "", None
        with self.files.ahead() as ask:
            try:
                for record in self._entity_records(rows):
                    if record["num_images"] and record["shard"] != open_path:
                        if stream:
                            stream.close()
                        open_path, stream = record["shard"], self._open_kb_shard(record["shard"])
                        ask(self._kb_shards_after(open_path, rows)[:1])
                    yield make_entity(record, _images(record, stream) if record["num_images"] and stream else ())
            finally:
                if stream:
                    stream.close()

    def entity(self, row: int) -> Entity:
        """One entity with all its pictures, by random access.

        Raises:
            IndexError: the row is outside the kb.
        """
        return next(self.entities(range(row, row + 1)))

    def entity_images(self, row: int) -> tuple[bytes, ...]:
        """An entity's pictures (JPEG bytes) in release order, by random access."""
        return self.entity(row).images

    def holding(self, split: str) -> "Dataset":
        """The same data, of which a split's mentions are read once and then held in memory, pictures and all."""
        if split in self._held:
            return self
        holding = copy(self)
        holding._held = {**self._held, split: []}
        return holding

    def mentions(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Mention]:
        """Mentions of a split in shard order; `rows` (ascending) picks some of them by position.

        Raises:
            ValueError: no such split.
            UserError: a shard is missing or damaged.
        """
        if split not in self._held:
            yield from self._read_mentions(split, rows)
            return
        if not self._held[split]:
            self._held[split] = list(self._read_mentions(split))
        held = self._held[split]
        yield from held if rows is None else (held[row] for row in rows)

    def texts(self, split: str) -> Iterator[Mention]:
        """Mentions of a split in shard order, without their pictures, which are not read."""
        if self._held.get(split):
            yield from self._held[split]
        else:
            yield from self._read_mentions(split, only=_TEXT_FIELDS)

    def _read_mentions(
        self, split: str, rows: Sequence[int] | None = None, only: Container[str] | None = None
    ) -> Iterator[Mention]:
        """Mentions from the shards.

        Args:
            only: The fields of a sample that are read.
        """
        start = 0
        num_mentions = self.num_mentions(split)
        chosen = range(num_mentions) if rows is None else rows if isinstance(rows, range) else set(rows)
        wanted = []
        for shard, samples in self.samples_of(split):
            inside = [samples[row - start] for row in range(start, start + len(samples)) if row in chosen]
            if inside:
                wanted.append((shard, inside))
            start += len(samples)
        with self.files.ahead() as ask:
            for number, (shard, inside) in enumerate(wanted):
                ask([following for following, _ in wanted[number + 1 : number + 2]])
                for sample in self._samples(shard, inside, only):
                    yield read_mention(sample.fields, self._address(shard, sample))

    def training_batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> Iterator[TrainingBatch]:
        """One rank's batches of one epoch, from `start_step` on; a pure function of the arguments.

        `batch_size` counts mentions over all ranks. Step sizes differ by at most one and never exceed it; a step is
        divided over ranks as evenly as possible (with more ranks than samples some get an empty batch). Of an entity's
        pictures one is drawn by (seed, epoch, mention_id). Memory holds one window of shards, as encoded bytes.

        Raises:
            ValueError: no such split, or arguments out of range.
            UserError: a shard is missing or damaged.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0 .. {world_size - 1}")
        num_samples, num_steps = self.num_mentions(split), self.num_steps(split, batch_size)
        shares = {
            step: step_bounds(num_samples, num_steps, step, rank, world_size) for step in range(start_step, num_steps)
        }
        return self._batches(split, shares, seed, epoch)

    def samples_of(self, split: str) -> list[tuple[ShardInfo, Sequence[int]]]:
        """A split's shards, each with the indices of its samples: of a view the kept ones."""
        shards = self.manifest.shards_of(split)
        starts = [0, *accumulate(shard.samples for shard in shards)]
        if split not in self.kept:
            return [(shard, range(shard.samples)) for shard in shards]
        kept = self.kept[split]
        cuts = [bisect_left(kept, start) for start in starts]
        return [
            (shard, [row - start for row in kept[first:last]])
            for shard, start, (first, last) in zip(shards, starts, pairwise(cuts), strict=False)
        ]

    @cached_property
    def _kb(self) -> pa.Table:
        address = self.files.address(ENTITIES_FILE)
        try:
            table = self.files.use(self.manifest.entities_file, partial(pq.read_table, memory_map=True))
        except pa.ArrowException as error:
            raise UserError(f"{address}: the file is damaged ({error}); prepare the dataset again") from error
        if not table.schema.equals(ENTITY_SCHEMA) or len(table) != self.num_entities:
            raise UserError(f"{address}: not the entities of this dataset; prepare it again")
        return table.combine_chunks()

    def _entity_records(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield from self._kb.take(pa.array(rows[start : start + _ROWS_AT_ONCE], pa.int64())).to_pylist()

    def _open_kb_shard(self, path: str) -> BinaryIO:
        for shard in self.manifest.shards_of(KB):
            if shard.path == path:
                return open_file(self.files, shard)
        raise UserError(f"{self.files.address(ENTITIES_FILE)}: unknown shard {path!r}; prepare the dataset again")

    def _kb_shards_after(self, path: str, rows: Sequence[int]) -> list[ShardInfo]:
        """The shards behind that one which hold some of the rows."""
        shards = self.manifest.shards_of(KB)
        starts = accumulate((shard.samples for shard in shards), initial=0)
        last = max(rows)
        return [shard for shard, start in zip(shards, starts, strict=False) if shard.path > path and start <= last]

    def _samples(
        self, shard: ShardInfo, indices: Sequence[int], only: Container[str] | None = None
    ) -> Iterator[Sample]:
        """The samples of a shard at `indices`, in shard order."""
        wanted, address = set(indices), self.files.address(shard.path)
        found, last = 0, "its start"
        with open_file(self.files, shard) as stream:
            for sample in read_samples(stream, address, wanted.__contains__, only):
                found, last = found + 1, f"sample {sample.key}"
                yield sample
        if found != len(wanted):
            # A tar with a damaged header reads as one that ends there.
            raise UserError(
                f"{address}: fewer samples than the manifest says, none wanted beyond {last}; prepare the dataset again"
            )

    def _address(self, shard: ShardInfo, sample: Sample) -> str:
        """The name of a sample for messages."""
        return f"{self.files.address(shard.path)}: {sample.key}"

    def _batches(self, split: str, shares: Mapping[int, range], seed: int, epoch: int) -> Iterator[TrainingBatch]:
        shards = self.samples_of(split)
        wanted = {position for share in shares.values() for position in share}
        loaded: dict[int, tuple[Mention, Entity]] = {}
        steps = iter(shares.items())
        step, share = next(steps, (None, range(0)))
        of_epoch = windows([len(samples) for _, samples in shards], seed, epoch)
        positions = ((window, self._positions(window, shards, wanted)) for window in of_epoch)
        with self.files.ahead() as ask:
            ahead = deque[tuple[Window, Positions]]()
            while step is not None:
                for window, wanted_of in islice(positions, _WINDOWS_AHEAD + 1 - len(ahead)):
                    ask([shards[number][0] for number in wanted_of])
                    ahead.append((window, wanted_of))
                window, wanted_of = ahead.popleft()
                loaded |= self._load(wanted_of, shards, seed, epoch)
                end = window.start + len(window.order)
                while step is not None and share.stop <= end:
                    pairs = [loaded.pop(position) for position in share]
                    yield TrainingBatch(step, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
                    step, share = next(steps, (None, range(0)))

    @staticmethod
    def _positions(window: Window, shards: Shards, wanted: Container[int]) -> Positions:
        """The wanted samples of a window: by shard, then by index in it, the position in the epoch."""
        positions: Positions = {number: {} for number in window.shards}
        for position, (number, index) in enumerate(window.order, start=window.start):
            if position in wanted:
                positions[number][shards[number][1][index]] = position
        return {number: position_of for number, position_of in positions.items() if position_of}

    def _load(self, positions: Positions, shards: Shards, seed: int, epoch: int) -> dict[int, tuple[Mention, Entity]]:
        """Samples by position in the epoch, each entity with its one drawn picture."""
        loaded = {}
        for number, position_of in positions.items():
            shard = shards[number][0]
            for sample in self._samples(shard, list(position_of)):
                loaded[position_of[sample.index]] = read_pair(sample.fields, self._address(shard, sample), seed, epoch)
        return loaded


def _images(record: Mapping[str, Any], stream: BinaryIO) -> tuple[bytes, ...]:
    spans = zip(record["image_offsets"], record["image_sizes"], strict=True)
    return tuple(read_span(stream, offset, size) for offset, size in spans)
