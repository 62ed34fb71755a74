"""Where training batches come from: streamed shards (towers train) or the feature cache (towers frozen).

Both are pure functions of (seed, epoch, step), split over workers by sample, with the same number of steps everywhere.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.batches import ItemBatch, stacked
from dsmip.collate import Collator
from dsmip.config import AugmentConfig, TrainConfig
from dsmip.gradients import Step
from dsmip.ops import augmentation
from dsmip.records import Entity, Mention
from dsmip.shards import Dataset
from dsmip.streams import draw
from dsmip.table import Table

Item = TypeVar("Item")
_READ_AHEAD = 4
_DRAWS = 1 << 32


class StreamSource:
    """Batches read from a split's shards, tokenized, decoded and augmented in a background thread."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        collator: Collator,
        config: TrainConfig,
        seed: int,
        held_out: float = 0.0,
    ) -> None:
        self.dataset, self.split, self.collator, self.config, self.seed = dataset, split, collator, config, seed
        self.held_out = held_out

    def num_steps(self) -> int:
        return self.dataset.num_steps(self.split, self.config.batch_size)

    def steps(self, epoch: int) -> Iterator[Step]:
        return read_ahead(self._steps(epoch), _READ_AHEAD)

    def _steps(self, epoch: int) -> Iterator[Step]:
        rank, world_size = distributed.rank(), distributed.world_size()
        batches = self.dataset.training_batches(
            self.split, self.config.batch_size, seed=self.seed, epoch=epoch, rank=rank, world_size=world_size
        )
        for batch in batches:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch, batch.step, rank)) % 2**63)
            own = self._random_entities(self.config.self_mentions, generator)
            negatives = self._random_entities(self.config.extra_negatives, generator)
            seen = [not is_held_out(mention.entity_id, self.held_out) for mention in batch.mentions]
            real = list(compress(batch.mentions, seen))
            columns = [*compress(batch.entities, seen), *own, *negatives]
            mentions = augmented(self.collator.mentions(real), self.config.augment, generator)
            if own:
                as_mentions = augmented(self.collator.entities(own), self.config.self_augment, generator)
                mentions = stacked(mentions, as_mentions)
            yield Step(
                mentions,
                augmented(self.collator.entities(columns), self.config.augment, generator),
                _rows([*real, *own]),
                _rows(columns),
            )

    def _random_entities(self, count: int, generator: torch.Generator) -> Sequence[Entity]:
        share = -(-count // distributed.world_size())
        rows = torch.randint(self.dataset.num_entities, (share,), generator=generator)
        return [self.dataset.entity(int(row)) for row in rows]


class CachedSource:
    """Batches of rows of cached features."""

    def __init__(self, mentions: Table, entities: Table, gold_row_N: Tensor, config: TrainConfig, seed: int) -> None:
        self.mentions, self.entities, self.gold_row_N = mentions, entities, gold_row_N
        self.config, self.seed = config, seed

    def num_steps(self) -> int:
        return -(-len(self.gold_row_N) // self.config.batch_size)

    def steps(self, epoch: int) -> Iterator[Step]:
        rank, world_size = distributed.rank(), distributed.world_size()
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        order = torch.randperm(len(self.gold_row_N), generator=generator)
        for batch in order.tensor_split(self.num_steps()):
            extra = torch.randperm(len(self.entities), generator=generator)[: self.config.extra_negatives]
            mine, extra = batch.tensor_split(world_size)[rank], extra.tensor_split(world_size)[rank]
            gold = self.gold_row_N[mine]
            rows = torch.cat([gold, extra])
            yield Step(self.mentions.take(mine), self.entities.take(rows), gold, rows)


def _rows(records: Sequence[Mention | Entity]) -> Tensor:
    """kb rows int64 [N], of an empty share as well."""
    return torch.tensor([record.entity_row for record in records], dtype=torch.int64)


def is_held_out(entity_id: str, share: float) -> bool:
    """Whether an entity's training mentions are left to stage two: a fixed draw per entity."""
    return draw(_DRAWS, "held out", entity_id) < share * _DRAWS


def augmented(batch: ItemBatch, config: AugmentConfig, generator: torch.Generator) -> ItemBatch:
    """The batch with random changes of pictures and texts; the same object when all is off."""
    if config == AugmentConfig():
        return batch
    has_image = batch.has_image
    if config.drop_pictures:
        has_image = has_image & (torch.rand(len(batch), generator=generator) >= config.drop_pictures)
    pictures = batch.pictures
    if has_image.any():
        pictures = augmentation.augment_pictures(pictures, has_image, _strength(config), generator)
    token_ids = augmentation.drop_tokens(batch.token_ids, config.drop_tokens, generator)
    return ItemBatch(_trimmed(token_ids), pictures, has_image)


def _trimmed(token_ids: Tensor) -> Tensor:
    """Without the places that no text uses any more: towers take as long as their longest text."""
    if len(token_ids) == 0:
        return token_ids
    return token_ids[:, : int(token_ids.argmax(dim=1).max()) + 1]  # end-of-text is the highest id


def _strength(config: AugmentConfig) -> augmentation.PictureAugmentation:
    return augmentation.PictureAugmentation(
        scale=(1 - config.scale, 1 / (1 - config.scale)),
        shift=config.shift,
        rotation=config.rotation,
        flip=config.flip,
        brightness=config.colour,
        contrast=config.colour,
        saturation=config.colour,
        hue=config.hue,
        grayscale=config.grayscale,
        erase=config.erase,
        padding=config.padding,
    )


def read_ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made up to `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(value: tuple[Item] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # handed over to the reader
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value[0]
    finally:
        stop.set()
