"""Exact ranks by counting, their means, and deterministic top-k. M mentions, E entities (columns), K kept columns,
C candidates, g width of a vector, X any number of leading dimensions.

A rank is 1 + the number of entities that score better (+ half of the tied ones: the realistic rank). Counts of disjoint
sets of columns add up, so tiles and workers count on their own. The gold's score must come from the same scoring call
as its column (another call differs in the last bits), and its column is excluded by index, never by value.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Counts(NamedTuple):
    """Entities other than the gold that score better than it and as well as it: int64 [M] each."""

    better_M: Tensor
    tied_M: Tensor


class TopK(NamedTuple):
    """The best K columns of each mention, best first: scores float [M, K], rows int64 [M, K]."""

    scores_MK: Tensor
    rows_MK: Tensor


def count_against(scores_ME: Tensor, gold_score_M: Tensor, gold_column_M: Tensor) -> Counts:
    """Counts of one tile of columns against golds that may lie in another tile.

    Args:
        gold_score_M: float [M], the gold's score.
        gold_column_M: int64 [M], the gold's column in this tile, -1 if it lies elsewhere.

    Raises:
        ValueError: A score is NaN, which compares false with everything and would rank first.

    >>> import torch
    >>> count_against(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), torch.tensor([1.0]), torch.tensor([2]))
    Counts(better_M=tensor([1]), tied_M=tensor([1]))
    """
    if bool(scores_ME.isnan().any()) or bool(gold_score_M.isnan().any()):
        raise ValueError("scores contain NaN: nothing can be ranked")
    gold_M1 = gold_score_M[:, None]
    better_M = (scores_ME > gold_M1).sum(dim=1)
    tied_M = (scores_ME == gold_M1).sum(dim=1)
    if scores_ME.shape[1] == 0:
        return Counts(better_M, tied_M)
    own_M1 = scores_ME.gather(1, gold_column_M.clamp_min(0)[:, None])
    here_M = gold_column_M >= 0
    better_M = better_M - ((own_M1 > gold_M1).squeeze(1) & here_M).long()
    tied_M = tied_M - ((own_M1 == gold_M1).squeeze(1) & here_M).long()
    return Counts(better_M, tied_M)


def optimistic_ranks(counts: Counts) -> Tensor:
    """float64 [M]: the gold before all entities that tie with it."""
    return 1.0 + counts.better_M.double()


def realistic_ranks(counts: Counts) -> Tensor:
    """float64 [M]: the gold in the middle of its ties (may be fractional)."""
    return 1.0 + counts.better_M.double() + counts.tied_M.double() / 2


def pessimistic_ranks(counts: Counts) -> Tensor:
    """float64 [M]: the gold after all entities that tie with it."""
    return 1.0 + counts.better_M.double() + counts.tied_M.double()


def hits_at(ranks_XM: Tensor, k: int) -> Tensor:
    """float64 [X]: share of ranks <= k, in 0..1; fractional ranks compare as they are.

    Like all means below it takes ranks float [..., M] of any leading shape X, () for one sample of mentions. Source:
    DSMIP eq. 19, which prints < by a slip.

    Raises:
        ValueError: M is 0, here and in all means below.
    """
    return (_some(ranks_XM) <= k).double().mean(dim=-1)


def mean_reciprocal_rank(ranks_XM: Tensor) -> Tensor:
    """float64 [X]: mean of 1 / rank, in 0..1."""
    return _some(ranks_XM).double().reciprocal().mean(dim=-1)


def mean_rank(ranks_XM: Tensor) -> Tensor:
    """float64 [X]: mean of the ranks, at least 1."""
    return _some(ranks_XM).double().mean(dim=-1)


def median_rank(ranks_XM: Tensor) -> Tensor:
    """float64 [X]: the middle rank, the mean of the two middle ones when M is even; at least 1.

    >>> import torch
    >>> median_rank(torch.tensor([[1.0, 9.0, 2.0, 3.0], [1.0, 1.0, 1.0, 4.0]]))
    tensor([2.5000, 1.0000], dtype=torch.float64)
    """
    sorted_XM = _some(ranks_XM).double().sort(dim=-1).values
    num_ranks = ranks_XM.shape[-1]
    return (sorted_XM[..., (num_ranks - 1) // 2] + sorted_XM[..., num_ranks // 2]) / 2


def adjusted_mean_rank_index(mean_rank_X: Tensor, num_entities: int) -> Tensor:
    """float64 [X]: 1 where every gold is first, 0 where the mean rank is that of guessing, below 0 where it is worse.

    It compares over knowledge bases of different sizes, as the adjusted MRR does. Source: Berrendorf et al., On the
    Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods, 2020.

    Args:
        mean_rank_X: float [X].
        num_entities: E, at least 2.

    >>> import torch
    >>> adjusted_mean_rank_index(torch.tensor([1.0, 3.0, 5.0]), 5)
    tensor([ 1.,  0., -1.], dtype=torch.float64)
    """
    return 1 - 2 * (mean_rank_X.double() - 1) / (num_entities - 1)


def adjusted_mean_reciprocal_rank(mrr_X: Tensor, num_entities: int) -> Tensor:
    """float64 [X]: 1 where every gold is first, 0 where the MRR is that of guessing, H_E / E.

    Source: Hoyt et al., A Unified Framework for Rank-based Evaluation Metrics for Link Prediction in Knowledge Graphs,
    2022.

    Args:
        mrr_X: float [X].
        num_entities: E, at least 2.

    >>> import torch
    >>> adjusted_mean_reciprocal_rank(torch.tensor([1.0, 0.75]), 2)
    tensor([1., 0.], dtype=torch.float64)
    """
    of_guessing = torch.arange(1, num_entities + 1, dtype=torch.float64).reciprocal().mean().item()
    return (mrr_X.double() - of_guessing) / (1 - of_guessing)


def _some(ranks_XM: Tensor) -> Tensor:
    if ranks_XM.shape[-1] == 0:
        raise ValueError("no ranks: the mean of nothing is undefined")
    return ranks_XM


def top_k(scores_ME: Tensor, k: int) -> TopK:
    """The min(k, E) best columns, best first, equal scores by lower column.

    Raises:
        ValueError: A score is NaN.

    >>> import torch
    >>> top_k(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 3).rows_MK
    tensor([[1, 0, 2]])
    """
    if bool(scores_ME.isnan().any()):
        raise ValueError("scores contain NaN: nothing can be ranked")
    k = min(k, scores_ME.shape[1])
    best_MK, rows_MK = scores_ME.topk(k, dim=1, sorted=True)
    if k == 0:
        return TopK(best_MK, rows_MK)
    # torch.topk takes any of several equal scores: redo the mentions whose last kept column is contested
    contested_M = (scores_ME >= best_MK[:, -1:]).sum(dim=1) > k
    if bool(contested_M.any()):
        full = scores_ME[contested_M].sort(dim=1, descending=True, stable=True)
        rows_MK[contested_M] = full.indices[:, :k]
    return merge_top_k(scores_ME.gather(1, rows_MK), rows_MK, k)


def merge_top_k(scores_MC: Tensor, rows_MC: Tensor, k: int) -> TopK:
    """The best min(k, C) of C candidates in any order, best first, equal scores by lower row.

    Args:
        scores_MC: float [M, C].
        rows_MC: int64 [M, C], for instance the top-k of several tiles side by side with KB rows.
    """
    rows_MC, by_row_MC = rows_MC.sort(dim=1)
    best_MC, by_score_MC = scores_MC.gather(1, by_row_MC).sort(dim=1, descending=True, stable=True)
    return TopK(best_MC[:, :k], rows_MC.gather(1, by_score_MC)[:, :k])


def largest_products(
    vectors_Mg: Tensor, vectors_Eg: Tensor, k: int, *, mention_tile: int = 256, entity_tile: int = 8192
) -> TopK:
    """The min(k, E) largest dot products of each mention, largest first, equal ones by lower row.

    Both float [., g], of one dtype and device. Memory holds one tile of products.

    Raises:
        ValueError: A score is NaN.

    >>> largest_products(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0], [3.0, 0.0], [2.0, 9.0]]), 2).rows_MK
    tensor([[1, 2]])
    """
    tops = [_largest_products(tile_mg, vectors_Eg, k, entity_tile) for tile_mg in vectors_Mg.split(mention_tile)]
    return TopK(torch.cat([top.scores_MK for top in tops]), torch.cat([top.rows_MK for top in tops]))


def _largest_products(vectors_Mg: Tensor, vectors_Eg: Tensor, k: int, entity_tile: int) -> TopK:
    best = top_k(vectors_Mg @ vectors_Eg[:entity_tile].T, k)
    for start in range(entity_tile, len(vectors_Eg), entity_tile):
        tile = top_k(vectors_Mg @ vectors_Eg[start : start + entity_tile].T, k)
        scores_MC = torch.cat([best.scores_MK, tile.scores_MK], dim=1)
        best = merge_top_k(scores_MC, torch.cat([best.rows_MK, tile.rows_MK + start], dim=1), k)
    return best


def recall_at(exact_top_MK: Tensor, candidate_row_MC: Tensor) -> float:
    """Share of the exact top-K that is among the candidates, 0..1; both rows int64, candidates in any order.

    An entity that ties with the last of the top, but is not named in it, does not count.

    Raises:
        ValueError: There is nothing to find.

    >>> recall_at(torch.tensor([[4, 2], [0, 1]]), torch.tensor([[1, 2, 3], [1, 0, 9]]))
    0.75
    """
    if exact_top_MK.numel() == 0:
        raise ValueError("no exact top: a share of nothing is undefined")
    candidate_row_MC = candidate_row_MC.sort(dim=1).values
    column_MK = torch.searchsorted(candidate_row_MC, exact_top_MK.contiguous())
    found_MK = candidate_row_MC.gather(1, column_MK.clamp_max(candidate_row_MC.shape[1] - 1)) == exact_top_MK
    return float(found_MK.double().mean())


def ranks_among(scores_MC: Tensor, rows_MC: Tensor, gold_row_M: Tensor) -> Tensor:
    """Realistic ranks float64 [M] of golds among C candidates alone; infinite where the gold is none of them.

    So a gold that was missed is no hit at any k, adds nothing to the MRR, and leaves no mean rank.

    Args:
        scores_MC: float, in any order.
        rows_MC: int64, each row at most once.

    Raises:
        ValueError: A score is NaN.

    >>> ranks_among(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), torch.tensor([[7, 5], [1, 2]]), torch.tensor([5, 6]))
    tensor([2., inf], dtype=torch.float64)
    """
    own_MC = rows_MC == gold_row_M[:, None]
    column_M = own_MC.int().argmax(dim=1)
    counts = count_against(scores_MC, scores_MC.gather(1, column_M[:, None])[:, 0], column_M)
    return realistic_ranks(counts).where(own_MC.any(dim=1), torch.inf)
