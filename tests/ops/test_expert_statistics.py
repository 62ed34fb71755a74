"""Expert statistics against the full matrix in float64, for any tiling; confidence numbers by hand."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.experts.statistics import (
    ExpertStatistics,
    confidence,
    expert_statistics,
    merge_statistics,
    num_confidence,
)

CLOSE: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}


def random_scores(num_mentions: int, num_entities: int, seed: int, spread: float = 5.0) -> Tensor:
    """Some scores are equal: they are whole numbers of quarters."""
    generator = torch.Generator().manual_seed(seed)
    scores_ME = torch.randn(num_mentions, num_entities, generator=generator, dtype=torch.float64)
    return (4 * spread * scores_ME).round() / 4


def tiled(scores_ME: Tensor, bounds: list[int]) -> list[ExpertStatistics]:
    edges = [0, *sorted({bound for bound in bounds if 0 < bound < scores_ME.shape[1]}), scores_ME.shape[1]]
    return [expert_statistics(scores_ME[:, a:b], first_row=a) for a, b in itertools.pairwise(edges)]


def assert_close(found: ExpertStatistics, expected: ExpertStatistics) -> None:
    assert torch.equal(found.top_M, expected.top_M)
    assert torch.equal(found.second_M, expected.second_M)
    assert torch.equal(found.row_M, expected.row_M)
    torch.testing.assert_close(found.mass_M, expected.mass_M, **CLOSE)
    torch.testing.assert_close(found.moment_M, expected.moment_M, **CLOSE)


@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 30.0, 400.0]))
def test_statistics_are_those_of_the_softmax(num_mentions: int, num_entities: int, seed: int, spread: float) -> None:
    scores_ME = random_scores(num_mentions, num_entities, seed, spread)
    found, log_p_ME = expert_statistics(scores_ME), torch.log_softmax(scores_ME, dim=1)
    best_M2 = scores_ME.sort(dim=1, descending=True).values[:, :2]
    torch.testing.assert_close(found.log_normaliser_M, torch.logsumexp(scores_ME, dim=1), **CLOSE)
    torch.testing.assert_close(found.entropy_M, -(log_p_ME.exp() * log_p_ME).sum(dim=1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.top_probability_M, log_p_ME.exp().amax(dim=1), **CLOSE)
    assert torch.equal(found.margin_M, best_M2[:, 0] - best_M2[:, 1])
    assert found.row_M.tolist() == [row.index(max(row)) for row in scores_ME.tolist()]


@given(st.integers(1, 40), st.lists(st.integers(1, 39), max_size=6), st.randoms(use_true_random=False))
def test_any_tiling_in_any_order_gives_the_statistics_of_the_whole(
    num_entities: int, bounds: list[int], rng: random.Random
) -> None:
    scores_ME = random_scores(3, num_entities, num_entities)
    parts = tiled(scores_ME, bounds)
    rng.shuffle(parts)
    assert_close(merge_statistics(parts), expert_statistics(scores_ME))
    if len(parts) > 2:  # workers merge what their own tiles came to
        assert_close(merge_statistics([merge_statistics(parts[:2]), *parts[2:]]), expert_statistics(scores_ME))


def test_equal_best_scores_have_no_margin_and_the_lowest_row() -> None:
    scores_ME = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    for parts in (tiled(scores_ME, []), tiled(scores_ME, [2]), tiled(scores_ME, [1, 2, 3])[::-1]):
        found = merge_statistics(parts)
        assert found.row_M.tolist() == [1, 0]
        assert found.margin_M.tolist() == [0.0, 0.0]
    assert found.entropy_M[1].item() == pytest.approx(math.log(4))


def test_a_kb_of_one_entity_is_certain() -> None:
    found = expert_statistics(torch.tensor([[7.0]]))
    assert (found.top_probability_M.item(), found.entropy_M.item(), found.margin_M.item()) == (1.0, 0.0, 0.0)


def test_confidence_of_two_experts_by_hand() -> None:
    """The first is sure of entity 2, the second undecided between 0 and 1."""
    first, second = torch.tensor([[0.0, 0.0, math.log(8.0)]]), torch.tensor([[math.log(2.0), math.log(2.0), 0.0]])
    experts = [expert_statistics(first), expert_statistics(second)]
    log_p_MBB = torch.tensor([[[math.log(0.8), math.log(0.1)], [math.log(0.2), math.log(0.4)]]])
    numbers = confidence(experts, log_p_MBB)[0].tolist()
    entropies = [-(0.8 * math.log(0.8) + 0.2 * math.log(0.1)), -(0.8 * math.log(0.4) + 0.2 * math.log(0.2))]
    expected = [0.8, math.log(8), entropies[0], 0.4, 0.0, entropies[1], 0.0, math.log(0.1), math.log(0.2)]
    assert numbers == pytest.approx(expected, abs=1e-7)
    assert len(numbers) == num_confidence(2)


def test_three_experts_have_eighteen_numbers_and_agree_with_themselves() -> None:
    scores_ME = random_scores(4, 9, 1)
    statistics = expert_statistics(scores_ME)
    top_M = statistics.top_probability_M.log()
    numbers_MF = confidence([statistics] * 3, top_M[:, None, None].expand(4, 3, 3))
    assert numbers_MF.shape == (4, 18)
    assert bool((numbers_MF[:, 9:12] == 1).all())
    torch.testing.assert_close(numbers_MF[:, 12:], top_M[:, None].expand(4, 6))
