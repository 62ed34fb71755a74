"""Ranks after re-ranking against a full list that is sorted by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmip.evaluation.ranks import Ranking
from dsmip.ops import ranking as ops
from dsmip.reranking.ranks import reranked


def first_ranking(scores_ME: Tensor, gold_row_M: Tensor, k: int) -> Ranking:
    gold_M = scores_ME.gather(1, gold_row_M[:, None])[:, 0]
    best = ops.top_k(scores_ME, min(k, scores_ME.shape[1]))
    return Ranking(ops.count_against(scores_ME, gold_M, gold_row_M), best[1], best[0])


def twin(scores_E: list[float], new: dict[int, float], gold: int) -> float:
    """Realistic rank in a list: candidates by their new scores, behind them the others by their old ones."""
    keys = [(0, -new[row]) if row in new else (1, -scores_E[row]) for row in range(len(scores_E))]
    better = sum(key < keys[gold] for key in keys)
    return 1 + better + (sum(key == keys[gold] for key in keys) - 1) / 2


@given(seed=st.integers(0, 10_000), num_entities=st.integers(1, 12), k=st.integers(1, 8), further=st.integers(0, 3))
def test_candidates_come_first_and_the_others_as_they_were(seed: int, num_entities: int, k: int, further: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_ME = torch.randint(-2, 3, (4, num_entities), generator=generator).float()  # with ties
    gold_row_M = torch.randint(num_entities, (4,), generator=generator)
    first = first_ranking(scores_ME, gold_row_M, k + further)
    row_MK = first.top_row_Mk[:, :k]
    score_MK = torch.randint(-2, 3, row_MK.shape, generator=generator).float()
    found = reranked(first, row_MK, score_MK, gold_row_M)
    for mention in range(4):
        new = dict(zip(row_MK[mention].tolist(), score_MK[mention].tolist(), strict=True))
        assert float(found.rank_M[mention]) == twin(scores_ME[mention].tolist(), new, int(gold_row_M[mention]))
        best = sorted(new, key=lambda row: (-new[row], row))
        assert found.top_row_Mk[mention].tolist() == [*best, *first.top_row_Mk[mention, len(best) :].tolist()]


def test_a_mention_with_fewer_candidates_has_no_more() -> None:
    scores_ME, gold = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1])
    first = first_ranking(scores_ME, gold, 3)
    rows, scores = torch.tensor([[0, 1, -1]]), torch.tensor([[0.0, 5.0, -torch.inf]])
    assert reranked(first, rows, scores, gold).rank_M.tolist() == [1.0]


def test_more_candidates_than_were_kept_are_refused() -> None:
    first = first_ranking(torch.rand(1, 5), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="3 candidates of 2 kept entities"):
        reranked(first, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), torch.tensor([0]))
