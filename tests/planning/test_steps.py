"""A step of a batch that is too long to be tried, from two smaller ones."""

import pytest
import torch

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.models.dsmip import Dsmip
from dsmip.planning.probing.parts import micro_batch, smaller
from dsmip.planning.probing.probe import CachedProbe, Meter
from dsmip.planning.probing.steps import Trained, whole_step
from dsmip.training.trainer import MatcherObjective
from tests.support.scoring.systems import features, seeded

BATCH = 32
METER = Meter(torch.device("cpu"), counts=True)


def test_operations_of_a_batch_are_those_of_smaller_ones_carried_on(small_config: ExperimentConfig) -> None:
    """Columns are a fixed part: what is prepared of them does not grow with the mentions."""
    matcher = seeded(1, lambda: Dsmip.build_part("multimodal", small_config, with_encoder=False))
    mentions, entities = (features(small_config, *of).under("multimodal") for of in ((12, 2), (40, 3)))

    def probe(count: int) -> Trained:
        own = TrainConfig(batch_size=max(count, 2), extra_negatives=BATCH - count)
        objective = MatcherObjective(matcher, own)
        return Trained(objective, CachedProbe(mentions, entities, own, 40).source(), own, set())

    whole = whole_step(probe, BATCH, BATCH, METER).cost
    carried = whole_step(probe, BATCH // 4, BATCH, METER).cost
    assert whole.flops > 0
    assert carried.flops == pytest.approx(whole.flops, rel=0.05)
    assert carried.seconds > 0


def test_a_larger_batch_takes_more(small_config: ExperimentConfig) -> None:
    matcher = seeded(1, lambda: Dsmip.build_part("text", small_config, with_encoder=False))
    mentions, entities = (features(small_config, *of).under("text") for of in ((12, 2), (40, 3)))

    def probe(count: int) -> Trained:
        own = TrainConfig(batch_size=max(count, 2))
        return Trained(MatcherObjective(matcher, own), CachedProbe(mentions, entities, own, 40).source(), own, set())

    small, large = (whole_step(probe, 8, batch, METER) for batch in (16, 4096))
    assert large.cost.flops > small.cost.flops


@pytest.mark.parametrize(("micro", "batch", "expected"), [(None, 32, None), (64, 32, None), (32, 32, None), (8, 32, 4)])
def test_a_smaller_batch_has_micro_batches_where_the_whole_one_has(
    micro: int | None, batch: int, expected: int | None
) -> None:
    whole = TrainConfig(batch_size=batch, micro_batch_size=micro)
    assert smaller(whole, 8).micro_batch_size == expected
    assert smaller(whole, batch).micro_batch_size == micro_batch(whole)
