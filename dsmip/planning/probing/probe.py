"""The probe: a few steps of the real thing on the real data, which tell what an item, a pair and a step cost.

Networks have random weights of the right sizes: what pretrained weights cost is the same, and they need not be there
yet. On a CPU one thread works, and its processor time counts, which other programs disturb least.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsmip.config import TrainConfig
from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.records import Entity, Mention
from dsmip.data.table import Table
from dsmip.encoders.base import FeatureEncoder, Side
from dsmip.planning.probing.measure import measured
from dsmip.planning.sizes import TableBytes, materialised, table_bytes
from dsmip.training.batches import CachedSource, Step, StreamSource
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import use_backend

SAMPLE = 256  # items of either side; of a smaller data set all
_SECONDS = 1.0  # that one measurement takes, more or less
_FIRST = 4  # items that tell how many more are affordable
_STEPS = 2
_ENTITIES, _MENTIONS = 512, 128  # pairs that are scored at most
_BACKWARD = 4.0  # of an encoding's seconds: a training step of it, more or less
_MOST_COLUMNS = 2048  # kb rows of a probed step on cached features


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of some work.

    Attributes:
        seconds: On this machine: processor time of a CPU's thread, or a GPU's on the clock.
        flops: Floating-point operations of its matrix products; 0 where they were not counted.
        reading: Of the seconds, those in which a CPU reads, decodes and changes items.
    """

    seconds: float = 0.0
    flops: float = 0.0
    reading: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.flops + other.flops, self.reading + other.reading)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.seconds * factor, self.flops * factor, self.reading * factor)


@dataclass(frozen=True)
class Sample:
    """Some items of a data set: its first training mentions, which are shuffled, and entities from all over the kb."""

    dataset: Dataset
    mentions: Sequence[Mention]
    entities: Sequence[Entity]

    @staticmethod
    def of(dataset: Dataset, size: int = SAMPLE) -> "Sample":
        """Up to `size` items of either side; where there are no training mentions, those of another split."""
        split = next((each for each in ("train", "test", "validation") if dataset.num_mentions(each)), "test")
        count = min(size, dataset.num_entities)
        rows = [number * dataset.num_entities // count for number in range(count)]
        mentions = islice(dataset.mentions(split), size)
        return Sample(dataset, list(mentions), list(dataset.entities(rows)))


@dataclass(frozen=True)
class Meter:
    """What measures work.

    Attributes:
        counts: Whether operations are counted, too, for machines that are not this one.
        seconds: That one encoding may take, more or less: of a sample's items as many as there is time for.
    """

    device: torch.device
    counts: bool = False
    seconds: float = _SECONDS

    def cost(self, work: Callable[[], object]) -> Cost:
        """Of one call."""
        _, cost = measured(work, self.device)
        return Cost(cost.seconds(self.device), self.flops(work) if self.counts else 0.0)

    def flops(self, work: Callable[[], object]) -> float:
        """Operations of one more call."""
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread computes, and nothing that is drawn is missed by others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(before)
        gc.collect()


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of a sample's items of one side.

    Attributes:
        table: Features of the first of them.
        has_image_N: Of these.
        stored: Bytes of a table of features.
        encode: An item read and encoded.
    """

    table: Table
    has_image_N: Tensor
    stored: TableBytes
    encode: Cost


@torch.no_grad()
def encoded(
    encoder: FeatureEncoder, collator: Collator, sample: Sample, side: Side, dtype: torch.dtype, meter: Meter
) -> Encoded:
    """Encodes as many of a sample's items as there is time for, at least a few."""
    collate: Callable[[Any], ItemBatch] = collator.mentions if side == "mentions" else collator.entities
    encode = encoder.encode_mentions if side == "mentions" else encoder.encode_entities
    items: Sequence[Any] = sample.mentions if side == "mentions" else sample.entities
    encoder.to(meter.device).eval()
    batch, read = measured(lambda: collate(items), torch.device("cpu"))
    few = batch.rows(0, _FIRST).to(meter.device)
    encode(few)  # the first call sets things up
    first = meter.cost(lambda: encode(few))
    count = affordable(first.seconds / len(few), len(items), meter.seconds)
    more, tables = batch.rows(0, count).to(meter.device), list[Table]()
    cost = first
    if count > len(few):
        cost = Meter(meter.device).cost(lambda: tables.append(encode(more))) * (1 / count)
    else:
        more, cost = few, first * (1 / len(few))
        tables.append(encode(few))
    table, has_image_N = tables[0].to(torch.device("cpu")), more.has_image.cpu()
    stored = table_bytes(table.cast(dtype), encoder.image_token_columns(), has_image_N, file=True)
    reading = read.cpu_s / max(len(items), 1)
    return Encoded(table, has_image_N, stored, Cost(cost.seconds + reading, first.flops / len(few), reading))


def affordable(seconds: float, most: int, budget: float = _SECONDS) -> int:
    """How many units of so many seconds a measurement may take, at least a few."""
    return max(min(int(budget / max(seconds, 1e-9)), most), min(_FIRST, most))


@dataclass(frozen=True)
class Scored:
    """What a matcher makes of features.

    Attributes:
        prepared: Bytes of prepared items by side.
        prepare: An item prepared.
        pair: A pair scored; nothing of a matcher whose mentions must be surveyed first.
    """

    prepared: Mapping[Side, TableBytes]
    prepare: Cost
    pair: Cost


@torch.no_grad()
def scored(matcher: Matcher, sides: Mapping[Side, tuple[Table, Tensor]], meter: Meter) -> Scored:
    """Prepares features of both sides and scores pairs of them."""
    matcher.to(meter.device).eval()
    use_backend(matcher, "auto", meter.device)
    tables = {side: table.to(meter.device) for side, (table, _) in sides.items()}
    prepared = {
        "mentions": matcher.prepare_mentions(tables["mentions"]),
        "entities": matcher.prepare_entities(tables["entities"]),
    }
    count = len(tables["entities"])
    prepare = meter.cost(lambda: matcher.prepare_entities(tables["entities"])) * (1 / max(count, 1))
    columns = matcher.image_columns(prepared["entities"])
    sizes: dict[Side, TableBytes] = {}
    for side, (_, has_image_N) in sides.items():
        own = prepared[side].to(torch.device("cpu"))
        sizes[side] = table_bytes(own, columns, has_image_N, file=side == "mentions")
    pair = Cost()
    if not matcher.surveyed():
        pair = _pair_cost(matcher, prepared["mentions"], prepared["entities"], meter)
    return Scored(sizes, prepare, pair)


def _pair_cost(matcher: Matcher, mentions: Table, entities: Table, meter: Meter) -> Cost:
    few = mentions.take(slice(0, _FIRST)), materialised(entities.to(torch.device("cpu")), 32).to(meter.device)
    matcher.score(*few)
    first = meter.cost(lambda: matcher.score(*few))
    of_pair = first.seconds / (len(few[0]) * len(few[1]))
    count = affordable(of_pair * _ENTITIES, _MENTIONS)
    own = materialised(mentions.to(torch.device("cpu")), count).to(meter.device)
    others = materialised(entities.to(torch.device("cpu")), _ENTITIES).to(meter.device)
    cost = Meter(meter.device).cost(lambda: matcher.score(own, others))
    return Cost(cost.seconds / (count * _ENTITIES), first.flops / (len(few[0]) * len(few[1])))


class InTurn(StreamSource):
    """Batches of shards that no thread reads ahead, so that reading can be told from computing."""

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        return self._steps(epoch, start)


def affordable_batch(config: TrainConfig, item_seconds: float, budget: float = 2 * _SECONDS) -> int:
    """How many mentions of a batch are probed: all, where a step of them is short enough."""
    columns = 1 + config.self_mentions / config.batch_size + config.extra_negatives / config.batch_size
    columns += config.hard_negatives
    a_mention = _BACKWARD * item_seconds * (1 + columns)
    return max(min(int(budget / max(a_mention, 1e-9)), config.batch_size), 2)


@dataclass(frozen=True)
class CachedProbe:
    """Batches of cached features, as those of a sample stand for them.

    Attributes:
        config: Its batch size is that of the probe.
    """

    mentions: Table
    entities: Table
    config: TrainConfig
    num_entities: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def source(self) -> CachedSource:
        """With as many batches as are probed."""
        config = self.config
        rows = min(self.num_entities, config.batch_size + config.extra_negatives + SAMPLE, _MOST_COLUMNS)
        kb = materialised(self.entities, rows)
        count = config.batch_size * _STEPS
        golds = torch.randint(rows, (count,), generator=self.generator)
        source = CachedSource(materialised(self.mentions, count), kb, golds, config, 0)
        if config.hard_negatives:
            source.hard_row_NK = torch.randint(rows, (count, config.hard_negatives), generator=self.generator)
        return source
