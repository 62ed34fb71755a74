"""Training batches: from streamed shards (towers train) or from the feature cache (towers frozen).

Both are pure functions of (seed, epoch, step), split over workers by sample, with the same number of steps everywhere.
The union of the workers' shares does not depend on how many they are: mentions, random entities and augmentation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import AugmentConfig, TrainConfig
from dsmip.data.collate import Collator, ItemBatch, stacked
from dsmip.data.dataset import Dataset, TrainingBatch
from dsmip.data.records import Entity, Mention
from dsmip.data.sampler import draw, step_bounds
from dsmip.data.table import Table
from dsmip.data.text import Tokenizer
from dsmip.ops import augmentation
from dsmip.ops.augmentation import Draws
from dsmip.parallel import read_ahead

Items = ItemBatch | Table
_READ_AHEAD = 4
_DRAWS = 1 << 32
_MANY_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One worker's share of one batch: M mentions, their M gold entities in the same order, then extra negatives.

    Attributes:
        gold_row_M, entity_row_E: Rows of the kb (E >= M).
        hard_of_H: int64 [H], whose hard negative each of the last H entities is (ascending); None: not told.
    """

    mentions: Items
    entities: Items
    gold_row_M: Tensor
    entity_row_E: Tensor
    hard_of_H: Tensor | None = None


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
        self.hard_row_NK: Tensor | None = None

    def num_steps(self) -> int:
        return self.dataset.num_steps(self.split, self.config.batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        return read_ahead(self._steps(epoch, start), _READ_AHEAD)

    def _steps(self, epoch: int, start: int) -> Iterator[Step]:
        batches = self.dataset.training_batches(
            self.split,
            self.config.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_step=start,
        )
        for batch in batches:
            yield self._step(epoch, batch)

    def _step(self, epoch: int, batch: TrainingBatch) -> Step:
        """This worker's share of a step: mentions, then self mentions; golds, self mentions' golds, random entities."""
        config, tokenizer = self.config, self.collator.tokenizer
        size, position_M = self._positions(batch.step)
        generator = _generator("entities", self.seed, epoch, batch.step)
        position_S, own = self._random_entities(config.self_mentions, generator)
        position_X, negatives = self._random_entities(config.extra_negatives, generator)
        drawn = size + config.self_mentions + config.extra_negatives
        seen = [not is_held_out(mention.entity_id, self.held_out) for mention in batch.mentions]
        real, position_M = list(compress(batch.mentions, seen)), position_M[torch.tensor(seen, dtype=torch.bool)]
        position_H, hard, hard_of_H = self._hard_negatives(real, position_M, drawn)
        columns = [*compress(batch.entities, seen), *own, *negatives, *hard]
        position_E = torch.cat([position_M, size + position_S, size + config.self_mentions + position_X, position_H])

        def draws(kind: str, total: int, position_N: Tensor) -> Draws:
            return Draws(_generator(kind, self.seed, epoch, batch.step), total, position_N)

        def changed(batch: ItemBatch, how: AugmentConfig, own: Draws) -> ItemBatch:
            return augmented(batch, how, own, tokenizer, tokenizer.context_length)

        real_draws = draws("augment mentions", size, position_M)
        mentions = changed(self.collator.mentions(real), config.augment, real_draws)
        if config.self_mentions:
            own_draws = draws("augment self mentions", config.self_mentions, position_S)
            themselves = self.collator.entities(own, as_mentions=True)
            mentions = stacked(mentions, changed(themselves, config.self_augment, own_draws))
        all_columns = drawn + size * config.hard_negatives
        entity_draws = draws("augment entities", all_columns, position_E)
        entities = changed(self.collator.entities(columns), config.augment, entity_draws)
        return Step(mentions, entities, _rows([*real, *own]), _rows(columns), hard_of_H)

    def _positions(self, step: int) -> tuple[int, Tensor]:
        """How many mentions a step has over all workers, and which of them are this worker's (int64 [M])."""
        count, steps = self.dataset.num_mentions(self.split), self.num_steps()
        whole = step_bounds(count, steps, step, 0, 1)
        share = step_bounds(count, steps, step, distributed.rank(), distributed.world_size())
        return len(whole), torch.arange(share.start - whole.start, share.stop - whole.start)

    def _hard_negatives(
        self, mentions: Sequence[Mention], position_M: Tensor, first: int
    ) -> tuple[Tensor, list[Entity], Tensor]:
        """The entities that mentions were last taken for: their positions among all columns, they, and whose."""
        entities, positions, whose = list[Entity](), list[int](), list[int]()
        k = 0 if self.hard_row_NK is None else self.hard_row_NK.shape[1]
        for number, (mention, position) in enumerate(zip(mentions, position_M.tolist(), strict=True)):
            rows = [] if self.hard_row_NK is None else self.hard_row_NK[self._row_of[mention.mention_id]].tolist()
            for place, row in enumerate(rows):
                if row >= 0:
                    entities.append(self.dataset.entity(row))
                    positions.append(first + position * k + place)
                    whose.append(number)
        return torch.tensor(positions, dtype=torch.int64), entities, torch.tensor(whose, dtype=torch.int64)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """Where a mention is in the order of the shards."""
        return {mention.mention_id: row for row, mention in enumerate(self.dataset.mentions(self.split))}

    def _random_entities(self, count: int, generator: torch.Generator) -> tuple[Tensor, Sequence[Entity]]:
        """This worker's share of `count` random entities of the kb: their positions among all, and they themselves."""
        rows = torch.randint(self.dataset.num_entities, (count,), generator=generator)
        own = torch.arange(count).tensor_split(distributed.world_size())[distributed.rank()]
        return own, [self.dataset.entity(int(row)) for row in rows[own]]


class CachedSource:
    """Batches of rows of cached features."""

    def __init__(self, mentions: Table, entities: Table, gold_row_N: Tensor, config: TrainConfig, seed: int) -> None:
        self.mentions, self.entities, self.gold_row_N = mentions, entities, gold_row_N
        self.config, self.seed = config, seed
        self.hard_row_NK: Tensor | None = None

    def num_steps(self) -> int:
        return -(-len(self.gold_row_N) // self.config.batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        rank, world_size = distributed.rank(), distributed.world_size()
        order = torch.randperm(len(self.gold_row_N), generator=_generator("order", self.seed, epoch))
        for number, batch in enumerate(order.tensor_split(self.num_steps())):
            if number < start:
                continue
            generator = _generator("entities", self.seed, epoch, number)
            extra = distinct_rows(len(self.entities), self.config.extra_negatives, generator)
            mine, extra = batch.tensor_split(world_size)[rank], extra.tensor_split(world_size)[rank]
            gold = self.gold_row_N[mine]
            rows = torch.cat([gold, extra, self._hard_negatives(mine)])
            yield Step(self.mentions.take(mine), self.entities.take(rows), gold, rows)

    def _hard_negatives(self, mentions_M: Tensor) -> Tensor:
        """kb rows of the entities that these mentions were last taken for."""
        if self.hard_row_NK is None:
            return torch.zeros(0, dtype=torch.int64)
        rows = self.hard_row_NK[mentions_M].flatten()
        return rows[rows >= 0]


def distinct_rows(num_rows: int, count: int, generator: torch.Generator) -> Tensor:
    """int64 [min(count, num_rows)]: different rows at random.

    Of a million rows and more a few are drawn one by one: a permutation of all would take longer than the step.
    """
    if num_rows < _MANY_ROWS or 4 * count > num_rows:
        return torch.randperm(num_rows, generator=generator)[:count]
    rows: dict[int, None] = {}
    while len(rows) < count:
        rows |= dict.fromkeys(torch.randint(num_rows, (count - len(rows),), generator=generator).tolist())
    return torch.tensor(list(rows), dtype=torch.int64)


def _generator(*label: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(draw(2**63, *label))


def _rows(records: Sequence[Mention | Entity]) -> Tensor:
    """kb rows int64 [N], of an empty share as well."""
    return torch.tensor([record.entity_row for record in records], dtype=torch.int64)


def is_held_out(entity_id: str, share: float) -> bool:
    """Whether an entity's training mentions are left to stage two: a fixed draw per entity."""
    return draw(_DRAWS, "held out", entity_id) < share * _DRAWS


def augmented(batch: ItemBatch, config: AugmentConfig, draws: Draws, tokenizer: Tokenizer, width: int) -> ItemBatch:
    """The batch with random changes of pictures and texts; the same object when all is off.

    Args:
        tokenizer: Of the batch.
        width: Tokens that the longest text of any share may have, the same for all workers.
    """
    if config == AugmentConfig():
        return batch
    device = batch.token_ids.device
    chance = draws.unit(width, device=device)
    order, mask = augmentation.kept_tokens(batch.token_mask, config.drop_tokens, chance)
    token_ids, extras = batch.token_ids.gather(1, order).masked_fill(~mask, tokenizer.pad_id), dict(batch.extras)
    if "word_places" in extras:
        extras["word_places"] = extras["word_places"].gather(1, order) & mask
    has_image = batch.has_image & (draws.unit(device=device) >= config.drop_pictures)
    if has_image.any():  # the last draws: whoever has no picture may leave them out
        images = augmentation.augment_images(batch.images, has_image, _strength(config), draws)
    else:
        images = torch.zeros_like(batch.images)
    if len(mask) and not tokenizer.fills_context:  # towers take as long as their longest text
        longest = int(mask.sum(dim=1).max())
        token_ids, mask = token_ids[:, :longest], mask[:, :longest]
        if "word_places" in extras:
            extras["word_places"] = extras["word_places"][:, :longest]
    return ItemBatch(token_ids, mask, images, has_image, extras)


def _strength(config: AugmentConfig) -> augmentation.ImageAugmentation:
    return augmentation.ImageAugmentation(
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
