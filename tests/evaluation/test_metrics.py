"""Every reported metric under the same tests: best and worst case, monotone, ties, and a twin over the full matrix."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.evaluation.metrics import HITS_AT, Difference, adjusted, compare_counts, confidence, measure, summarise
from dsmip.ops.ranking import Counts, count_against
from dsmip.ops.significance import resamples


class Draws(TypedDict):
    num_resamples: int
    num_flips: int


NUM_ENTITIES = 30  # more than the largest k
FEW: Draws = {"num_resamples": 200, "num_flips": 399}


@dataclass(frozen=True)
class Expected:
    """A metric by its definition: `twin` takes first and last position of each gold in the sorted scores."""

    higher_is_better: bool
    worst: float
    twin: Callable[[list[tuple[int, int]]], float]


def middle(positions: list[tuple[int, int]]) -> list[float]:
    return [(first + last) / 2 for first, last in positions]


def hits(k: int) -> Expected:
    return Expected(True, 0.0, lambda positions: statistics.fmean(rank <= k for rank in middle(positions)))


METRICS = {f"hits@{k}": hits(k) for k in HITS_AT} | {
    "mrr": Expected(True, 1 / NUM_ENTITIES, lambda positions: statistics.fmean(1 / rank for rank in middle(positions))),
    "mean_rank": Expected(False, NUM_ENTITIES, lambda positions: statistics.fmean(middle(positions))),
    "mean_rank_optimistic": Expected(False, NUM_ENTITIES, lambda positions: statistics.fmean(a for a, _ in positions)),
    "mean_rank_pessimistic": Expected(False, NUM_ENTITIES, lambda positions: statistics.fmean(b for _, b in positions)),
    "median_rank": Expected(False, NUM_ENTITIES, lambda positions: statistics.median(middle(positions))),
}
every_metric = pytest.mark.parametrize("name", METRICS)
one_count = st.tuples(st.integers(0, NUM_ENTITIES - 1), st.integers(0, 5))  # better, tied
counts_lists = st.lists(one_count, min_size=1, max_size=9)


def made(pairs: list[tuple[int, int]]) -> Counts:
    return Counts(torch.tensor([better for better, _ in pairs]), torch.tensor([tied for _, tied in pairs]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, num_mentions: int) -> Counts:
    """Ranks as a trained model makes them: many at the top, few far down."""
    better_M = (NUM_ENTITIES * torch.rand(num_mentions, generator=seeded(seed)) ** 3).long()
    return Counts(better_M, torch.randint(2, (num_mentions,), generator=seeded(seed + 1)))


def test_no_metric_escapes() -> None:
    assert set(summarise(made([(0, 0)]))) == set(METRICS)


@every_metric
def test_best_and_worst(name: str) -> None:
    assert summarise(made([(0, 0)] * 3))[name] == 1.0
    assert summarise(made([(NUM_ENTITIES - 1, 0)] * 3))[name] == pytest.approx(METRICS[name].worst)


@every_metric
@settings(max_examples=30, deadline=None)
@given(pairs=counts_lists, data=st.data())
def test_a_better_rank_never_worsens_it(name: str, pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(pairs) - 1))
    better, tied = pairs[which]
    improved = list(pairs)
    improved[which] = (data.draw(st.integers(0, better)), data.draw(st.integers(0, tied)))
    before, after = summarise(made(pairs))[name], summarise(made(improved))[name]
    slack = 1e-12
    assert after >= before - slack if METRICS[name].higher_is_better else after <= before + slack


@every_metric
@settings(max_examples=30, deadline=None)
@given(pairs=counts_lists)
def test_ties_lie_between_the_best_and_the_worst_order(name: str, pairs: list[tuple[int, int]]) -> None:
    """All ties lost, as they are, all ties won: from worse to better, or the other way round."""
    lost = summarise(made([(better + tied, 0) for better, tied in pairs]))[name]
    won = summarise(made([(better, 0) for better, _ in pairs]))[name]
    low, high = (lost, won) if METRICS[name].higher_is_better else (won, lost)
    assert low - 1e-12 <= summarise(made(pairs))[name] <= high + 1e-12


@every_metric
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_mentions=st.integers(1, 8), num_values=st.integers(1, 40))
def test_it_equals_its_twin_over_the_full_matrix(name: str, seed: int, num_mentions: int, num_values: int) -> None:
    scores_ME = torch.randint(num_values, (num_mentions, NUM_ENTITIES), generator=seeded(seed)).float()
    gold_M = torch.randint(NUM_ENTITIES, (num_mentions,), generator=seeded(seed + 1))
    positions = []
    for row, gold in zip(scores_ME.tolist(), gold_M.tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        positions.append((ordered.index(row[gold]) + 1, NUM_ENTITIES - ordered[::-1].index(row[gold])))
    counts = count_against(scores_ME, scores_ME.gather(1, gold_M[:, None])[:, 0], gold_M)
    assert summarise(counts)[name] == pytest.approx(METRICS[name].twin(positions))


@every_metric
def test_samples_side_by_side_are_measured_on_their_own(name: str) -> None:
    better_RM = torch.randint(NUM_ENTITIES, (3, 6), generator=seeded())
    counts = Counts(better_RM, better_RM % 3)
    alone = [summarise(Counts(*rows))[name] for rows in zip(counts.better_M, counts.tied_M, strict=True)]
    assert measure(counts)[name].tolist() == pytest.approx(alone)


@every_metric
def test_nothing_has_no_metric(name: str) -> None:
    with pytest.raises(ValueError, match="no ranks"):
        measure(Counts(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)))[name]


@every_metric
def test_its_interval_holds_the_figure_and_narrows_with_more_mentions(name: str) -> None:
    few, many = drawn(1, 50), drawn(1, 2000)
    widths = []
    for counts in (few, many):
        low, high = confidence(counts, seeded(), num_resamples=400)[name]
        assert low <= summarise(counts)[name] <= high
        widths.append(high - low)
    assert 0 <= widths[1] < widths[0]


@every_metric
def test_its_interval_equals_that_of_its_twin_over_every_resample(name: str) -> None:
    counts = drawn(2, 23)
    positions = [(1 + better, 1 + better + tied) for better, tied in zip(*map(Tensor.tolist, counts), strict=True)]
    (rows_RM,) = resamples(23, 200, seeded())  # what the same seed draws
    figures = [METRICS[name].twin([positions[row] for row in rows]) for rows in rows_RM.tolist()]
    expected = np.quantile(figures, [0.025, 0.975])
    assert confidence(counts, seeded(), num_resamples=200)[name] == pytest.approx(tuple(expected))


@every_metric
def test_its_interval_over_equal_ranks_is_a_point(name: str) -> None:
    figure = summarise(made([(3, 1)] * 7))[name]
    assert confidence(made([(3, 1)] * 7), seeded(), num_resamples=20)[name] == pytest.approx((figure, figure))


@every_metric
def test_a_difference_turns_round_with_the_order_of_systems(name: str) -> None:
    first, second = drawn(3, 40), drawn(5, 40)
    there, back = (compare_counts(*pair, seeded(), **FEW)[name] for pair in ((first, second), (second, first)))
    assert (there.first, there.second) == (summarise(first)[name], summarise(second)[name])
    assert there.difference == there.second - there.first == -back.difference
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert there.p_value == back.p_value


@every_metric
def test_a_system_does_not_differ_from_itself(name: str) -> None:
    found = compare_counts(drawn(3, 40), drawn(3, 40), seeded(), **FEW)[name]
    value = summarise(drawn(3, 40))[name]
    assert found == Difference(value, value, 0.0, (0.0, 0.0), None if name == "median_rank" else 1.0)


@every_metric
def test_a_system_that_wins_everywhere_is_significant(name: str) -> None:
    found = compare_counts(made([(25, 0)] * 30), made([(0, 0)] * 30), seeded(), **FEW)[name]
    low, high = found.interval
    assert low > 0 if METRICS[name].higher_is_better else high < 0
    assert found.p_value is None if name == "median_rank" else found.p_value == pytest.approx(1 / 400)


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    """One place better on every mention: each system's own interval is far wider than the step between them."""
    second = Counts(drawn(1, 200).better_M, torch.zeros(200, dtype=torch.int64))
    first = Counts(second.better_M + 1, second.tied_M)
    found = compare_counts(first, second, seeded(), **FEW)["mean_rank"]
    assert found.interval == pytest.approx((-1.0, -1.0))
    assert found.p_value == pytest.approx(1 / 400)
    assert confidence(second, seeded(), num_resamples=200)["mean_rank"][1] > found.first


@every_metric
def test_figures_of_several_seeds_are_means(name: str) -> None:
    firsts, seconds = [drawn(seed, 40) for seed in (3, 13, 23)], [drawn(seed, 40) for seed in (5, 15)]
    sides = [Counts(*map(torch.stack, zip(*each, strict=True))) for each in (firsts, seconds)]
    found = compare_counts(sides[0], sides[1], seeded())[name]
    before, after = ([summarise(each)[name] for each in side] for side in (firsts, seconds))
    assert (found.first, found.second) == pytest.approx((statistics.fmean(before), statistics.fmean(after)))
    assert found.deviations == pytest.approx((statistics.stdev(before), statistics.stdev(after)))
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_seeds_that_differ_widen_the_interval() -> None:
    """Half of the seeds find everything, half nothing: on the same mentions no resample of mentions alone differs."""
    good, bad, others = made([(0, 0)] * 20), made([(9, 0)] * 20), made([(9, 0)] * 20)
    seeds = Counts(*map(torch.stack, zip(good, bad, good, bad, strict=True)))
    found = compare_counts(others, seeds, seeded(), num_resamples=400)["hits@1"]
    assert (found.difference, found.deviations[0]) == (0.5, None)
    assert found.interval == (0.0, 1.0)
    assert compare_counts(others, good, seeded(), num_resamples=400)["hits@1"].interval == (1.0, 1.0)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 60))
def test_guessing_has_nothing_when_adjusted_for_chance(size: int) -> None:
    every_rank = summarise(made([(better, 0) for better in range(size)]))
    assert adjusted(every_rank, size) == pytest.approx({"mean_rank_index": 0.0, "mrr": 0.0})
    assert adjusted(summarise(made([(0, 0)] * 3)), size) == pytest.approx({"mean_rank_index": 1.0, "mrr": 1.0})
    assert adjusted(summarise(made([(size - 1, 0)])), size)["mean_rank_index"] == pytest.approx(-1.0)


def test_one_entity_leaves_nothing_to_adjust() -> None:
    assert adjusted(summarise(made([(0, 0)])), 1) == {}


def test_only_the_same_mentions_can_be_paired() -> None:
    with pytest.raises(ValueError, match="3 mentions against 4"):
        compare_counts(drawn(1, 3), drawn(1, 4), seeded())
