"""Nearest products: linear maps of both sides whose products come nearest to given scores, in closed form.

Reduced-rank regression (Izenman, 1975) with a ridge, on both sides at once: of all W of rank g the one of the least
||S - X W Y^T||. M mentions, E entities, d and f numbers of each, g rank.
"""

import torch
from torch import Tensor

_RIDGE = 1e-2  # of the mean of a side's squared singular values


def nearest_products(
    mention_inputs_Md: Tensor, entity_inputs_Ef: Tensor, scores_ME: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Maps A [g, d] and B [g, f], float64, so that A x . B y is near the score of a mention x and an entity y.

    Where there are fewer than g directions, the other rows are 0.
    """
    x_Md, y_Ef = mention_inputs_Md.double(), entity_inputs_Ef.double()
    factor_dd, factor_ff = _factor(x_Md), _factor(y_Ef)
    cross_df = x_Md.T @ scores_ME.double() @ y_Ef
    cross_df = torch.linalg.solve_triangular(factor_dd, cross_df, upper=False)
    cross_df = torch.linalg.solve_triangular(factor_ff, cross_df.T, upper=False).T
    left_dg, strength_g, right_fg = _largest(cross_df, rank)
    root_g = strength_g.sqrt()
    maps = (
        torch.linalg.solve_triangular(factor.T, vectors * root_g, upper=True).T
        for factor, vectors in ((factor_dd, left_dg), (factor_ff, right_fg))
    )
    a_gd, b_gf = (torch.cat([each, each.new_zeros(rank - len(each), each.shape[1])]) for each in maps)
    return a_gd, b_gf


def _factor(inputs_Nd: Tensor) -> Tensor:
    """Lower Cholesky factor of X^T X with the ridge."""
    gram_dd = inputs_Nd.T @ inputs_Nd
    ridge = (_RIDGE * gram_dd.diagonal().mean()).clamp_min(1e-12)
    gram_dd.diagonal().add_(ridge)
    factor_dd: Tensor = torch.linalg.cholesky(gram_dd)
    return factor_dd


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, at most `rank`, with left and right vectors as columns."""
    if min(matrix.shape) <= 2 * rank:
        left, strength, right_t = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], strength[:rank], right_t.T[:, :rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=rank, niter=4)
