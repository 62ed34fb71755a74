"""Ranking against the slow obvious twin, with ties, tiles and slices of the kb."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip import distributed
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.metrics import summarise
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.evaluation.ranks import Ranking
from dsmip.evaluation.tiles import TileSize
from dsmip.ops.ranking import Counts
from tests.support.scoring.matchers import CPU, TableMatcher, numbered, ranks_by_sorting
from tests.support.training.workers import run_workers


def ranked(
    scores_ME: Tensor,
    gold_M: Tensor,
    chosen_ME: Tensor | None = None,
    choices: tuple[str, ...] = (),
    **options: Any,
) -> Ranking:
    num_mentions, num_entities = scores_ME.shape
    matcher = TableMatcher(scores_ME, chosen_ME)
    index = EntityIndex([numbered(num_entities)])
    model = RankedModel(matcher, numbered(num_mentions), index, gold_M, choices)
    return rank_unrefined(model, CPU, **options)


@given(seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), tiles=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_ranks_equal_a_full_sort(seed: int, shape: tuple[int, int], tiles: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_ME = torch.randint(0, 4, shape, generator=generator).float()  # few values: many ties
    gold_M = torch.randint(shape[1], (shape[0],), generator=generator)
    ranking = ranked(scores_ME, gold_M, tile_size=TileSize(tiles, max(tiles // 2, 1)), top_k=3)
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    order_ME = scores_ME.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(ranking.top_row_Mk, order_ME[:, :3])
    assert torch.equal(ranking.top_score_Mk, scores_ME.gather(1, order_ME[:, :3]))


def test_reported_metrics_of_hand_made_ranks() -> None:
    """Ranks 1, 2.5 (one better, one tied) and 4."""
    metrics = summarise(Counts(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 0])))
    assert metrics["hits@1"] == pytest.approx(1 / 3)
    assert metrics["hits@3"] == pytest.approx(2 / 3)
    assert metrics["hits@5"] == 1.0
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2.5 + 1 / 4) / 3)
    assert metrics["mean_rank"] == pytest.approx(2.5)
    assert metrics["mean_rank_optimistic"] == pytest.approx(7 / 3)
    assert metrics["mean_rank_pessimistic"] == pytest.approx(8 / 3)


def test_metrics_of_some_mentions() -> None:
    ranking = ranked(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0, 1]))
    assert ranking.metrics()["mrr"] == 0.75
    assert ranking.metrics(torch.tensor([True, False]))["mrr"] == 0.5


def test_constant_scores_rank_in_the_middle() -> None:
    """A model that says nothing must not look good."""
    ranking = ranked(torch.zeros(2, 5), torch.tensor([0, 4]))
    assert ranking.rank_M.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("column", [0, 3])
def test_nan_is_refused(column: int) -> None:
    scores_ME = torch.zeros(2, 4)
    scores_ME[1, column] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ranked(scores_ME, torch.tensor([0, 1]), tile_size=TileSize(1, 2))


def test_choices_of_pairs_are_counted() -> None:
    scores_ME = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    chosen_ME = torch.tensor([[0, 2, 2], [1, 0, 2]])
    ranking = ranked(scores_ME, torch.tensor([1, 0]), chosen_ME, ("a", "b", "c"), top_k=2, tile_size=TileSize(128, 2))
    assert ranking.choices is not None
    assert ranking.choices.pairs_MB.tolist() == [[1, 0, 2], [1, 1, 1]]
    assert ranking.choices.gold_M.tolist() == [2, 1]
    assert ranking.choices.top_Mk.tolist() == [[0, 2], [0, 2]]


def test_choices_are_left_out_where_only_ranks_are_wanted() -> None:
    """As in validation, where workers hold slices of the kb."""
    ranking = ranked(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), torch.tensor([[1, 0]]))
    assert ranking.rank_M.tolist() == [2.0]
    assert ranking.choices is None


SHAPE = (5, 11)


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 5, SHAPE, generator=generator).float(), torch.tensor([0, 10, 4, 5, 6])


def rank_slice() -> dict[str, Tensor]:
    scores_ME, gold_M = example()
    first, stop = (0, 4) if distributed.rank() == 0 else (4, SHAPE[1])
    model = RankedModel(
        TableMatcher(scores_ME, torch.zeros(SHAPE, dtype=torch.int64)),
        numbered(SHAPE[0]),
        EntityIndex([numbered(stop - first, first)], first),
        gold_M,
    )
    ranking = rank_unrefined(model, CPU, tile_size=TileSize(2, 3))
    assert ranking.cost.unrefined is not None
    band, close_M = torch.tensor(ranking.cost.unrefined.band), ranking.cost.unrefined.close_M
    return {"better": ranking.counts.better_M, "tied": ranking.counts.tied_M, "band": band, "close": close_M}


@pytest.mark.slow
def test_slices_of_the_kb_add_up(tmp_path: Path) -> None:
    scores_ME, gold_M = example()
    expected = ranked(scores_ME, gold_M)
    assert expected.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    workers = run_workers(rank_slice, 2, tmp_path)
    for worker in workers:
        assert torch.equal(worker["band"], workers[0]["band"])
        assert torch.equal(worker["close"], expected.counts.tied_M)  # scores are whole numbers
        assert torch.equal(worker["better"], expected.counts.better_M)
        assert torch.equal(worker["tied"], expected.counts.tied_M)
