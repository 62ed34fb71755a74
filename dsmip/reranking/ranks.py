"""Ranks after re-ranking: the candidates first, by their new scores, then all others as the first stage has them.

Shapes: M mentions, K candidates of each, k kept entities.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsmip.evaluation.ranks import Ranking
from dsmip.ops import ranking as ops


def reranked(first: Ranking, row_MK: Tensor, score_MK: Tensor, gold_row_M: Tensor) -> Ranking:
    """The ranking of a first stage whose best entities got new scores.

    A gold among the candidates has its rank there. Any other has all candidates before it, and of the rest those that
    the first stage has before it: what it ties with among the candidates is before it now.

    Args:
        first: With at least the candidates among its best entities.
        row_MK: kb rows int64 [M, K], the first stage's best; -1 where there are fewer.
        score_MK: Their new scores; -inf where there is no candidate.
        gold_row_M: kb rows int64 [M].

    Raises:
        ValueError: The first stage kept fewer of its best entities than there are candidates.
    """
    if row_MK.shape[1] > first.top_row_Mk.shape[1]:
        raise ValueError(f"{row_MK.shape[1]} candidates of {first.top_row_Mk.shape[1]} kept entities")
    count_M = (row_MK >= 0).sum(dim=1)
    is_gold_MK = row_MK == gold_row_M[:, None]
    found_M = is_gold_MK.any(dim=1)
    column_M = is_gold_MK.long().argmax(dim=1)
    gold_M = score_MK.gather(1, column_M[:, None])[:, 0]
    better_M, tied_M = ops.count_against(score_MK, gold_M, column_M.where(found_M, -1))
    ahead_M = first.counts.better_M
    tied_before_M = (count_M - ahead_M).clamp_min(0)  # candidates that the first stage scores as the gold
    counts = ops.Counts(
        better_M.where(found_M, torch.maximum(ahead_M, count_M)),
        tied_M.where(found_M, first.counts.tied_M - tied_before_M),
    )
    best = ops.merge_top_k(score_MK, row_MK, row_MK.shape[1])
    rest = slice(row_MK.shape[1], None)
    return replace(
        first,
        counts=counts,
        top_row_Mk=torch.cat([best.rows_MK, first.top_row_Mk[:, rest]], dim=1),
        top_score_Mk=torch.cat([best.scores_MK, first.top_score_Mk[:, rest]], dim=1),
    )
