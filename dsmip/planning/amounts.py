"""Amounts of work: each step of the way, from counts of a data set and the costs of items, pairs and steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.base import Side
from dsmip.evaluation.experts.survey import KEPT_BYTES
from dsmip.models import find_system
from dsmip.planning.probing.parts import EncoderCosts, PartCosts, SystemCosts, WholeCosts
from dsmip.planning.probing.probe import Cost

REFINED = 1.5  # of a ranking's first pass: close pairs are scored again in float64
_FITTED_PAIRS = 2**25  # of each expert's scores when its scale is fitted (dsmip.training.fusion.fit)
_GATE_STEP = Cost(0.002)  # of a gate that is fitted: a few numbers a mention


@dataclass(frozen=True)
class Counts:
    """Items of a data set, and those of them with a picture; mentions by split."""

    entities: int
    entities_with_image: int
    mentions: Mapping[str, int]
    mentions_with_image: Mapping[str, int]

    @staticmethod
    def of(dataset: Dataset) -> "Counts":
        """From the manifest."""
        manifest = dataset.manifest
        splits = manifest.splits
        return Counts(
            manifest.entities,
            manifest.entities_with_image,
            {name: each.mentions for name, each in splits.items()},
            {name: each.with_image for name, each in splits.items()},
        )

    def with_entities(self, count: int) -> "Counts":
        """Those of a larger or smaller kb with the same share of pictures."""
        return replace(
            self, entities=count, entities_with_image=round(count * self.entities_with_image / self.entities)
        )

    def items(self, split: str) -> tuple[int, int]:
        """Items of a split or of the kb ("kb"), and how many of them have a picture."""
        if split == "kb":
            return self.entities, self.entities_with_image
        return self.mentions[split], self.mentions_with_image[split]


def side_of(split: str) -> Side:
    return "entities" if split == "kb" else "mentions"


def steps_of(mentions: float, train: TrainConfig) -> int:
    """Steps of an epoch."""
    return ceil(mentions / train.batch_size)


def validations_of(train: TrainConfig) -> int:
    """How often a training validates: after every so many epochs, and after the last."""
    return train.epochs // train.validate_every + bool(train.epochs % train.validate_every)


def minings_of(train: TrainConfig) -> int:
    """How often it looks for hard negatives."""
    return (train.epochs - 1) // train.hard_negatives_every if train.hard_negatives else 0


def encoding(encoder: EncoderCosts, counts: Counts, splits: tuple[str, ...]) -> Cost:
    """Features of whole splits, or of the kb."""
    total = Cost()
    for split in splits:
        total += encoder.encode[side_of(split)] * counts.items(split)[0]
    return total


def training(config: ExperimentConfig, part: PartCosts, costs: SystemCosts, counts: Counts) -> Cost:
    """Stage one of a part, without the features of frozen towers."""
    train, kb, validation = config.train_of(part.name), counts.entities, counts.mentions["validation"]
    mentions, total = counts.mentions["train"], Cost()
    if part.kind == "reranker":
        return _reranking(config, part, costs, counts)
    assert part.encoder is not None
    if part.step is not None:
        seen = mentions * (1 - config.held_out) if part.kind == "cached" else mentions
        total += part.step.cost * (steps_of(seen, train) * train.epochs)
    judged = part.prepare * (kb + validation) + part.pair * (validation * kb)
    mined = part.prepare * mentions + part.pair * (mentions * kb)
    if part.kind == "towers":
        judged += encoding(part.encoder, counts, ("kb", "validation"))
        mined += encoding(part.encoder, counts, ("train",))
    return total + judged * (1 if part.kind == "nothing" else validations_of(train)) + mined * minings_of(train)


def _reranking(config: ExperimentConfig, part: PartCosts, costs: SystemCosts, counts: Counts) -> Cost:
    system, train = find_system(config.model), config.train_of(part.name)
    first = costs.parts[system.rerankers(config.system)[part.name]]
    assert first.encoder is not None
    assert part.step is not None
    mentions, validation = counts.mentions["train"], counts.mentions["validation"]
    found = encoding(first.encoder, counts, ("kb", "train", "validation"))
    found += first.prepare * (counts.entities + mentions + validation)
    found += first.pair * ((mentions + validation) * counts.entities)
    candidates = min(system.num_candidates(config.system), counts.entities)
    judged = part.pair * (validation * candidates)
    return found + part.step.cost * (steps_of(mentions, train) * train.epochs) + judged * validations_of(train)


def training_tables(part: PartCosts) -> tuple[str, ...]:
    """Of which splits stage one keeps a part's features."""
    return {"cached": ("train", "validation", "kb"), "nothing": ("validation", "kb")}.get(part.kind, ())


def feature_encoders(config: ExperimentConfig, costs: SystemCosts) -> dict[str, EncoderCosts]:
    """Encoders of all that a gated whole reads, or of the parts that have features."""
    found = {name: part.encoder for name, part in costs.parts.items() if part.encoder is not None}
    if costs.whole is None:
        return found
    names = find_system(config.model).feature_parts(config.system)
    return {name: found[name] if name in found else costs.whole.extra[name] for name in names}


def trial(config: ExperimentConfig, whole: WholeCosts, counts: Counts, epochs: int) -> Cost:
    """One trial of stage two, from where the one before ended or from the start, by so many epochs."""
    train, kb, validation = config.tune_train(), counts.entities, counts.mentions["validation"]
    mentions = counts.mentions["train"] * (config.held_out or 1.0)
    ready = whole.prepare * (kb + validation + mentions)
    if whole.fused:
        fitted = min(mentions, max(_FITTED_PAIRS // kb, 1))
        again = 0 if kept_bytes(config, whole, counts, validation) else validation  # the ranking of the fitted gate
        known = whole.pair * ((fitted + (mentions + validation) * REFINED + again) * kb)
        return ready + known + _GATE_STEP * (steps_of(mentions, train) * epochs)
    assert whole.step is not None
    judged = whole.prepare * (kb + validation) + whole.pair * (validation * kb)
    mined = (whole.prepare * mentions + whole.pair * (mentions * kb)) * minings_of(train)
    validations = epochs // train.validate_every + bool(epochs % train.validate_every)
    return whole.step.cost * (steps_of(mentions, train) * epochs) + judged * validations + mined


def judging(config: ExperimentConfig, whole: WholeCosts, counts: Counts) -> Cost:
    """The winner of a sweep beside its experts, their mean and their product."""
    kb, validation = counts.entities, counts.mentions["validation"]
    mentions = counts.mentions["train"] * config.held_out or validation
    fitted = min(mentions, max(_FITTED_PAIRS // kb, 1))
    ready = whole.prepare * (2 * (kb + validation) + mentions)
    passes = 1 if kept_bytes(config, whole, counts, validation) else 3 if whole.fused else 2  # experts; the winner
    return ready + whole.pair * ((fitted + passes * validation * REFINED) * kb)


def kept_bytes(config: ExperimentConfig, whole: WholeCosts, counts: Counts, num_mentions: float) -> int:
    """Bytes of experts' scores that are kept for the second pass of a ranking; 0 where experts score twice, or once."""
    num_experts = len(find_system(config.model).choices(config.system))
    size = int(num_experts * num_mentions * counts.entities * 4)
    return size if whole.fused and size <= KEPT_BYTES else 0


def evaluation(config: ExperimentConfig, costs: SystemCosts, counts: Counts, split: str, *, kb_is_there: bool) -> Cost:
    """The default evaluation of a split: features, index and the exact ranking of the whole system."""
    system, count = find_system(config.model), counts.mentions[split]
    pairs, total = count * counts.entities * REFINED, Cost()
    wanted = (split,) if kb_is_there else (split, "kb")
    if costs.whole is not None:
        for encoder in feature_encoders(config, costs).values():
            total += encoding(encoder, counts, wanted)
        whole = costs.whole
        passes = 2 if whole.fused and not kept_bytes(config, whole, counts, count) else 1
        return total + whole.prepare * (counts.entities + count) + whole.pair * (pairs * passes)
    rerankers = system.rerankers(config.system)
    first = next(part for part in costs.parts.values() if part.kind != "reranker")
    assert first.encoder is not None
    total += encoding(first.encoder, counts, wanted)
    total += first.prepare * (counts.entities + count) + first.pair * pairs
    for name in rerankers:
        candidates = min(system.num_candidates(config.system), counts.entities)
        total += costs.parts[name].pair * (count * candidates)
    return total
