"""Ranks by counting and top-k against twins that sort whole rows in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.ranking import (
    Counts,
    count_against,
    hits_at,
    mean_rank,
    mean_reciprocal_rank,
    merge_top_k,
    optimistic_ranks,
    pessimistic_ranks,
    realistic_ranks,
    top_k,
)

few_scores = st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0, float("inf"), float("-inf")])  # many ties
rows_of_scores = st.integers(1, 12).flatmap(
    lambda e: st.lists(st.lists(few_scores, min_size=e, max_size=e), min_size=1, max_size=4)
)


def count_ranks(scores_ME: Tensor, gold_column_M: Tensor) -> Counts:
    """Counts of one tile with every column in it."""
    return count_against(scores_ME, scores_ME.gather(1, gold_column_M[:, None])[:, 0], gold_column_M)


def sorted_ranks(row: list[float], gold: int) -> tuple[int, int]:
    """First and last place that the gold's score takes in the sorted row."""
    ordered = sorted(row, reverse=True)
    return ordered.index(row[gold]) + 1, len(ordered) - ordered[::-1].index(row[gold])


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_scores, data=st.data())
def test_ranks_equal_those_of_a_full_sort(rows: list[list[float]], data: st.DataObject) -> None:
    golds = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    counts = count_ranks(torch.tensor(rows), torch.tensor(golds))
    first, last = zip(*(sorted_ranks(row, gold) for row, gold in zip(rows, golds, strict=True)), strict=True)
    assert optimistic_ranks(counts).tolist() == list(first)
    assert pessimistic_ranks(counts).tolist() == list(last)
    assert realistic_ranks(counts).tolist() == [(a + b) / 2 for a, b in zip(first, last, strict=True)]


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_scores, width=st.integers(1, 13), data=st.data())
def test_counts_of_tiles_add_up(rows: list[list[float]], width: int, data: st.DataObject) -> None:
    scores = torch.tensor(rows)
    gold = torch.tensor([data.draw(st.integers(0, scores.shape[1] - 1)) for _ in rows])
    gold_score = scores.gather(1, gold[:, None])[:, 0]
    better, tied = torch.zeros_like(gold), torch.zeros_like(gold)
    for start in range(0, scores.shape[1], width):
        tile = scores[:, start : start + width]
        column = torch.where((gold >= start) & (gold < start + width), gold - start, -1)
        counts = count_against(tile, gold_score, column)
        better, tied = better + counts.better_M, tied + counts.tied_M
    whole = count_ranks(scores, gold)
    assert torch.equal(better, whole.better_M)
    assert torch.equal(tied, whole.tied_M)


def test_an_empty_tile_counts_nothing() -> None:
    counts = count_against(torch.zeros(2, 0), torch.zeros(2), torch.tensor([-1, -1]))
    assert counts.better_M.tolist() == counts.tied_M.tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_scores, k=st.integers(0, 14))
def test_top_k_equals_a_stable_sort(rows: list[list[float]], k: int) -> None:
    best = top_k(torch.tensor(rows), k)
    for n, row in enumerate(rows):
        expected = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        assert best.rows_MK[n].tolist() == expected
        assert best.scores_MK[n].tolist() == [row[e] for e in expected]


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_scores, k=st.integers(1, 5), width=st.integers(1, 13), data=st.data())
def test_top_k_of_tiles_merge_to_the_whole_in_any_order(
    rows: list[list[float]], k: int, width: int, data: st.DataObject
) -> None:
    scores = torch.tensor(rows)
    starts = data.draw(st.permutations(range(0, scores.shape[1], width)))
    tiles = [(top_k(scores[:, start : start + width], k), start) for start in starts]
    merged = merge_top_k(
        torch.cat([t.scores_MK for t, _ in tiles], 1), torch.cat([t.rows_MK + start for t, start in tiles], 1), k
    )
    assert torch.equal(merged.rows_MK, top_k(scores, k).rows_MK)


def test_nan_is_refused() -> None:
    scores = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(ValueError, match="NaN"):
        count_ranks(scores, torch.tensor([0]))
    with pytest.raises(ValueError, match="NaN"):
        count_against(scores[:, :1], scores[:, 1], torch.tensor([-1]))
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 1)


def test_measures_of_a_hand_made_case() -> None:
    ranks = realistic_ranks(Counts(torch.tensor([0, 0, 3]), torch.tensor([0, 1, 0])))
    assert ranks.tolist() == [1.0, 1.5, 4.0]
    assert hits_at(ranks, 1) == pytest.approx(1 / 3)  # 1.5 is not within 1
    assert hits_at(ranks, 4) == 1.0
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 1 / 1.5 + 1 / 4) / 3)
    assert mean_rank(ranks) == pytest.approx(6.5 / 3)
    with pytest.raises(ValueError, match="no ranks"):
        mean_rank(ranks[:0])
