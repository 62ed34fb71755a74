"""The costs of a system's parts under a configuration: what each of them reads, makes, stores and trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import Collator, ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.encoders.base import FeatureEncoder, Side
from dsmip.encoders.vgg import RANDOM
from dsmip.models import find_system
from dsmip.planning.probing.probe import (
    CachedProbe,
    Cost,
    Encoded,
    InTurn,
    Meter,
    Sample,
    affordable_batch,
    encoded,
    one_thread,
    scored,
)
from dsmip.planning.probing.steps import Stepped, Trained, whole_step
from dsmip.planning.sizes import PartBytes, TableBytes, part_bytes, side_by_side
from dsmip.reranking.candidates import score_mentions
from dsmip.reranking.training import RerankingObjective
from dsmip.runs.load_config import changed
from dsmip.runs.loaded_model import TrainedParts
from dsmip.training.trainer import MatcherObjective
from dsmip.units.fusion.matcher import FusedMatcher
from dsmip.units.matcher import Matcher, Reranker

Kind = Literal["towers", "cached", "nothing", "reranker"]
"""What its training reads: items, which its towers encode anew; cached features; nothing; pairs of items."""
SIDES: tuple[Side, Side] = ("mentions", "entities")
_PROBED_CANDIDATES = 8


@dataclass(frozen=True)
class EncoderCosts:
    """What a feature part's features cost.

    Attributes:
        stored: Bytes of a table, by side.
        encode: An item, with reading it, by side.
        image_bytes: Of a picture as it is read; 0: none are.
        module: Bytes of the encoder in memory.
        own: Whether the tables are the run's own, because the towers train.
        shared: What stands for a table that another part has as well; None: nobody has.
    """

    stored: Mapping[Side, TableBytes]
    encode: Mapping[Side, Cost]
    image_bytes: int
    module: int
    own: bool
    shared: str | None


@dataclass(frozen=True)
class PartCosts:
    """What a part costs.

    Attributes:
        trained, total: Parameters.
        encoder: None: of a re-ranker, which has no features.
        prepared: Bytes of prepared items by side.
        prepare: An item.
        pair: A pair of items scored.
        step: A training step; None: nothing is trained.
    """

    name: str
    kind: Kind
    trained: int
    total: int
    num_bytes: PartBytes
    encoder: EncoderCosts | None
    prepared: Mapping[Side, TableBytes]
    prepare: Cost
    pair: Cost
    step: Stepped | None


@dataclass(frozen=True)
class WholeCosts:
    """What a gated whole costs.

    Attributes:
        extra: Encoders of its features that are no parts, by name.
        fused: Whether its gate is fitted to rankings of its experts over the whole kb.
        pair: A pair of items scored by all that scores it.
        step: Of a trial; None: of a gate that is fitted, an epoch of which costs next to nothing.
    """

    trained: int
    total: int
    num_bytes: PartBytes
    extra: Mapping[str, EncoderCosts]
    fused: bool
    prepared: Mapping[Side, TableBytes]
    prepare: Cost
    pair: Cost
    step: Stepped | None


@dataclass(frozen=True)
class SystemCosts:
    """What a system's parts cost, and its gated whole if there is one."""

    parts: Mapping[str, PartCosts]
    whole: WholeCosts | None


def bare(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without weights of its own: networks of the same sizes, drawn at random."""
    of_gate = {"system": {"gate": {"vgg_weights": RANDOM}}} if find_system(config.model).gated else {}
    return changed(config, {"backbone": {"pretrained": None}, **of_gate})


def probe_system(config: ExperimentConfig, dataset: Dataset, meter: Meter) -> SystemCosts:
    """Probes every part, then the gated whole.

    Raises:
        UserError: The backbone cannot be had, or a network whose weights must be there.
    """
    system, sample = find_system(config.model), Sample.of(dataset)
    settings, found, features = bare(config), dict[str, PartCosts](), dict[str, dict[Side, Encoded]]()
    for name in system.part_names(config.system):
        with one_thread():
            if name in system.rerankers(config.system):
                found[name] = _reranker(name, settings, sample, meter)
            else:
                found[name], features[name] = _part(name, settings, sample, meter)
    whole = None
    if system.gated:
        with one_thread():
            whole = _whole(settings, sample, found, features, meter)
    return SystemCosts(found, whole)


def _part(name: str, config: ExperimentConfig, sample: Sample, meter: Meter) -> tuple[PartCosts, dict[Side, Encoded]]:
    system = find_system(config.model)
    matcher = system.build_part(name, config, with_encoder=True)
    trains = any(each.requires_grad for each in matcher.parameters())
    towers = matcher.encoder_trains() or matcher.reads_items
    sizes, counts = part_bytes(matcher), _counts(matcher)
    encoder, features = _encoder(name, matcher, config, sample, meter, own=matcher.encoder_trains())
    tables: dict[Side, tuple[Table, Tensor]] = {side: (each.table, each.has_image_N) for side, each in features.items()}
    of_pairs = scored(matcher, tables, meter)
    step = None
    if towers:
        step = _tower_step(name, matcher, config, sample, encoder, meter)
    elif trains:
        step = _cached_step(matcher, config.train_of(name), tables, sample.dataset.num_entities, of_pairs.pair, meter)
    kind: Kind = "towers" if towers else "cached" if trains else "nothing"
    return PartCosts(
        name, kind, *counts, sizes, encoder, of_pairs.prepared, of_pairs.prepare, of_pairs.pair, step
    ), features


def _encoder(
    name: str, encoder: FeatureEncoder, config: ExperimentConfig, sample: Sample, meter: Meter, *, own: bool
) -> tuple[EncoderCosts, dict[Side, Encoded]]:
    parts = TrainedParts(".", config)
    collator, form = parts.collator(name), find_system(config.model).item_format(config.system, name)
    found = {side: encoded(encoder, collator, sample, side, parts.feature_dtype, meter) for side in SIDES}
    reads_images = "image" in form.of_either
    assert isinstance(encoder, torch.nn.Module)
    size = sum(each.numel() * each.element_size() for each in encoder.state_dict().values())
    costs = EncoderCosts(
        {side: each.stored for side, each in found.items()},
        {side: each.encode for side, each in found.items()},
        3 * collator.image_size**2 if reads_images else 0,
        size,
        own,
        _shared(encoder, form),
    )
    return costs, found


def _shared(encoder: FeatureEncoder, form: ItemFormat) -> str | None:
    made = encoder.shared_form()
    return None if made is None else f"{made} {form}"


def _tower_step(
    name: str, matcher: Matcher, config: ExperimentConfig, sample: Sample, encoder: EncoderCosts, meter: Meter
) -> Stepped:
    train = config.train_of(name)
    few = affordable_batch(train, max(cost.seconds for cost in encoder.encode.values()))
    towers = set(matcher.tower_tensors())

    def probe(count: int) -> Trained:
        own = smaller(train, count)
        return Trained(MatcherObjective(matcher, own), _stream(name, own, config, sample.dataset), own, towers)

    return whole_step(probe, few, train.batch_size, meter, held=2 * (micro_batch(train) or 0))


def _stream(name: str, train: TrainConfig, config: ExperimentConfig, dataset: Dataset) -> InTurn:
    collator = TrainedParts(".", config).collator(name)
    source = InTurn(dataset, "train", collator, train, config.seed, config.held_out)
    if train.hard_negatives:
        shape = (dataset.num_mentions("train"), train.hard_negatives)
        source.hard_row_NK = torch.randint(dataset.num_entities, shape)
    return source


def smaller(train: TrainConfig, batch_size: int) -> TrainConfig:
    """A training of smaller batches, with as many further columns a mention, in two micro-batches where it has any."""
    share, micro = batch_size / train.batch_size, micro_batch(train)
    return train.model_copy(
        update={
            "batch_size": batch_size,
            "micro_batch_size": micro and min(micro, max(batch_size // 2, 1)),
            "self_mentions": round(train.self_mentions * share),
            "extra_negatives": round(train.extra_negatives * share),
        }
    )


def micro_batch(train: TrainConfig) -> int | None:
    """Mentions of a micro-batch; None where one holds the whole batch."""
    return train.micro_batch_size if (train.micro_batch_size or 0) < train.batch_size else None


def _cached_step(
    matcher: Matcher,
    train: TrainConfig,
    tables: Mapping[Side, tuple[Table, Tensor]],
    num_entities: int,
    pair: Cost,
    meter: Meter,
) -> Stepped:
    """Of fewer mentions against as many columns: pairs then grow with the mentions."""
    columns = train.batch_size * (1 + train.hard_negatives) + min(train.extra_negatives, num_entities)
    no_more = train.model_copy(update={"hard_negatives": 0, "extra_negatives": 0})
    few = affordable_batch(no_more, pair.seconds * columns)

    def probe(count: int) -> Trained:
        own = train
        if count < train.batch_size:
            own = no_more.model_copy(update={"batch_size": count, "extra_negatives": columns - count})
        source = CachedProbe(tables["mentions"][0], tables["entities"][0], own, num_entities).source()
        return Trained(MatcherObjective(matcher, own), source, own, set(matcher.tower_tensors()))

    return whole_step(probe, few, train.batch_size, meter)


def _reranker(name: str, config: ExperimentConfig, sample: Sample, meter: Meter) -> PartCosts:
    system = find_system(config.model)
    reranker = system.build_reranker(name, config).to(meter.device).eval()
    sizes, counts = part_bytes(reranker), _counts(reranker)
    collator = TrainedParts(".", config).collator(name)
    candidates = system.num_candidates(config.system)
    few = min(_PROBED_CANDIDATES, candidates, len(sample.entities))
    pair = _candidate_cost(reranker, collator, sample, few, meter)
    train = config.train_of(name)

    def probe(count: int) -> Trained:
        own = smaller(train, count).model_copy(
            update={"hard_negatives": max(candidates - 1, 1), "extra_negatives": 0, "self_mentions": 0}
        )
        towers = set(reranker.tower_tensors())
        return Trained(RerankingObjective(reranker, own), _stream(name, own, config, sample.dataset), own, towers)

    affordable = affordable_batch(train, pair.seconds * candidates / 2)
    step = whole_step(probe, affordable, train.batch_size, meter, held=2 * (micro_batch(train) or 0))
    return PartCosts(name, "reranker", *counts, sizes, None, {}, Cost(), pair, step)


def _candidate_cost(reranker: Reranker, collator: Collator, sample: Sample, few: int, meter: Meter) -> Cost:
    row_mK = torch.arange(few)[None]

    def score() -> None:
        score_mentions(reranker, lambda row: sample.entities[row], collator, sample.mentions[:1], row_mK, meter.device)

    score()
    return meter.cost(score) * (1 / few)


def _whole(
    config: ExperimentConfig,
    sample: Sample,
    parts: Mapping[str, PartCosts],
    features: Mapping[str, Mapping[Side, Encoded]],
    meter: Meter,
) -> WholeCosts:
    system = find_system(config.model)
    matcher = system.build_whole(config)
    sizes, counts, extra = part_bytes(matcher), _counts(matcher), dict[str, EncoderCosts]()
    known = dict(features)
    for name in system.feature_parts(config.system):
        if name not in parts:
            encoder = system.build_encoder(name, config)
            extra[name], known[name] = _encoder(name, encoder, config, sample, meter, own=False)
    tables: dict[Side, tuple[Table, Tensor]] = {}
    for side in SIDES:
        own = {name: known[name][side] for name in system.feature_parts(config.system)}
        count = min(len(each.table) for each in own.values())
        rows = {name: each.table.rows(slice(0, count)) for name, each in own.items()}
        has_image_N = torch.stack([each.has_image_N[:count] for each in own.values()]).any(dim=0)
        tables[side] = side_by_side(rows, gated=True), has_image_N
    of_pairs, step, pair = scored(matcher, tables, meter), None, Cost()
    fused = isinstance(matcher, FusedMatcher)
    if fused:
        for name in matcher.surveyed():
            pair += parts[name].pair
    else:
        pair, entities = of_pairs.pair, sample.dataset.num_entities
        step = _cached_step(
            matcher, config.tune_train(), tables, entities, _sum(parts, system.choices(config.system)), meter
        )
    return WholeCosts(*counts, sizes, extra, fused, of_pairs.prepared, of_pairs.prepare, pair, step)


def _sum(parts: Mapping[str, PartCosts], names: tuple[str, ...]) -> Cost:
    total = Cost()
    for name in names:
        total += parts[name].pair
    return total


def _counts(module: torch.nn.Module) -> tuple[int, int]:
    parameters = [*module.parameters()]
    return sum(each.numel() for each in parameters if each.requires_grad), sum(each.numel() for each in parameters)
