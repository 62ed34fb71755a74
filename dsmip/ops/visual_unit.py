"""The dual unit of pictures (MIMIC: Luo et al., KDD 2023, section 4.3) for all pairs by five matrix products.

One direction scores every item A (query side) against every item B (value side); d is the unit width:

    h = F LN1(q_a + v_b) + f        s = <LN2(tanh(g.h + g0) h + k_b), LN2(q_a)>

LayerNorms of sums of one A and one B vector need only dot products, so no [A, B, d] tensor exists. With x~ for x
centred over channels, al = F (w1 * q~), be = F (w1 * v~), ga = F b1 + f, y = LN2(q), y' = w2 * y:

    r0  = (|q~ + v~|^2 / d + eps)^-1/2      h = r0 (al + be) + ga
    t   = tanh(g.h + g0)                    n = t h~ + k~,  r = t r0
    s   = <y', n> (|n|^2 / d + eps)^-1/2 + y.b2

and |q~ + v~|^2, <y', n>, |n|^2 are expanded into pairwise dot products and per-item scalars. Where v is close to -q, or
h to -k, the expansion cancels; those few pairs are computed directly. float32 only: bfloat16 errs by more than 0.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CANCELLATION = 1e-3
"""A squared norm smaller than this share of its terms' sum is computed directly."""


class DualWeights(NamedTuple):
    """Parameters of one direction: LN1, F and f, g and g0, LN2. Vectors [d], fc_weight [d, d], gate_bias a scalar."""

    add_norm_weight: Tensor
    add_norm_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float

    def constant(self) -> Tensor:
        """ga [d]: the part of h that depends on no item."""
        return F.linear(self.add_norm_bias, self.fc_weight, self.fc_bias)


class QuerySide(NamedTuple):
    """q~, y' and al~, each [A, d], and the scalars |q~|^2, g.al, y'.al~, y'.ga~, |al~|^2, al~.ga~, y.b2 [A, 7]."""

    query_Ad: Tensor
    target_Ad: Tensor
    mapped_Ad: Tensor
    scalars_A7: Tensor


class ValueSide(NamedTuple):
    """v~, k~ and be~, each [B, d], and the scalars |v~|^2, g.be, |be~|^2, be~.ga~, be~.k~, ga~.k~, |k~|^2 [B, 7]."""

    value_Bd: Tensor
    key_Bd: Tensor
    mapped_Bd: Tensor
    scalars_B7: Tensor


def query_side(query_Ad: Tensor, weights: DualWeights) -> QuerySide:
    """All that a pair needs of q [A, d]."""
    centred = _centred(query_Ad)
    normed = F.layer_norm(
        query_Ad,
        query_Ad.shape[-1:],
        weights.norm_weight,
        weights.norm_bias,
        weights.eps,
    )
    # n is centred, so only the centred part of y' meets it
    target = _centred(normed * weights.norm_weight)
    mapped = F.linear(centred * weights.add_norm_weight, weights.fc_weight)
    mapped_centred, constant = _centred(mapped), _centred(weights.constant())
    scalars = [
        _dot(centred, centred),
        mapped @ weights.gate_weight,
        _dot(target, mapped_centred),
        target @ constant,
        _dot(mapped_centred, mapped_centred),
        mapped_centred @ constant,
        normed @ weights.norm_bias,
    ]
    return QuerySide(centred, target, mapped_centred, torch.stack(scalars, dim=-1))


def value_side(value_Bd: Tensor, key_Bd: Tensor, weights: DualWeights) -> ValueSide:
    """All that a pair needs of v and k [B, d]."""
    centred, key = _centred(value_Bd), _centred(key_Bd)
    mapped = F.linear(centred * weights.add_norm_weight, weights.fc_weight)
    mapped_centred, constant = _centred(mapped), _centred(weights.constant())
    scalars = [
        _dot(centred, centred),
        mapped @ weights.gate_weight,
        _dot(mapped_centred, mapped_centred),
        mapped_centred @ constant,
        _dot(mapped_centred, key),
        key @ constant,
        _dot(key, key),
    ]
    return ValueSide(centred, key, mapped_centred, torch.stack(scalars, dim=-1))


def dual_unit(a: QuerySide, b: ValueSide, weights: DualWeights) -> Tensor:
    """Scores of one direction, float [A, B]."""
    d = weights.fc_bias.shape[0]
    constant = weights.constant()
    constant_centred = _centred(constant)
    q_q, g_al, y_al, y_ga, al_al, al_ga, y_b2 = a.scalars_A7[:, None].unbind(dim=-1)
    v_v, g_be, be_be, be_ga, be_k, ga_k, k_k = b.scalars_B7[None].unbind(dim=-1)

    sum_AB = torch.addmm(q_q + v_v, a.query_Ad, b.value_Bd.T, alpha=2).clamp_min(0)
    r0 = (sum_AB / d + weights.eps).rsqrt()
    t = torch.tanh((g_al + g_be) * r0 + (constant @ weights.gate_weight + weights.gate_bias))
    r = t * r0
    numerator = r * (y_al + a.target_Ad @ b.mapped_Bd.T) + t * y_ga + a.target_Ad @ b.key_Bd.T
    mapped_sum_AB = torch.addmm(al_al + be_be, a.mapped_Ad, b.mapped_Bd.T, alpha=2)
    mapped_key_AB = torch.addmm(be_k, a.mapped_Ad, b.key_Bd.T)
    h_h = r * r * mapped_sum_AB + 2 * r * t * (al_ga + be_ga) + t * t * (constant_centred @ constant_centred)
    n_n = (h_h + 2 * (r * mapped_key_AB + t * ga_k) + k_k).clamp_min(0)
    scores_AB = numerator * (n_n / d + weights.eps).rsqrt() + y_b2

    with torch.no_grad():
        # h itself is a sum of three terms that can cancel: measure against all of them
        terms_AB = r * r * (al_al + be_be) + t * t * (constant_centred @ constant_centred) + k_k
        close_AB = (sum_AB < CANCELLATION * (q_q + v_v)) | (n_n < CANCELLATION * terms_AB)
        rows_A, rows_B = close_AB.nonzero(as_tuple=True)
    if len(rows_A) == 0:
        return scores_AB
    return scores_AB.index_put((rows_A, rows_B), _direct(a, b, rows_A, rows_B, weights))


def query_vectors(a: QuerySide) -> Tensor:
    """[A, d + 1]: y' and y.b2, to be multiplied with `value_vectors`."""
    return torch.cat([a.target_Ad, a.scalars_A7[:, 6:]], dim=-1)


def value_vectors(b: ValueSide, eps: float) -> Tensor:
    """[B, d + 1], whose products with `query_vectors` stand for the scores where only a dot product will do.

    A score is none: n and its norm mix both sides. These are the scores of a shut gate, t = 0: <LN2(k), LN2(q)>.
    """
    return F.pad(F.layer_norm(b.key_Bd, b.key_Bd.shape[-1:], eps=eps), (0, 1), value=1.0)


def _direct(a: QuerySide, b: ValueSide, rows_A: Tensor, rows_B: Tensor, weights: DualWeights) -> Tensor:
    """Scores [n] of single pairs, without expanding any norm."""
    shape, eps = (weights.fc_bias.shape[0],), weights.eps
    added_nd = F.layer_norm(
        a.query_Ad[rows_A] + b.value_Bd[rows_B],
        shape,
        weights.add_norm_weight,
        weights.add_norm_bias,
        eps,
    )
    h_nd = F.linear(added_nd, weights.fc_weight, weights.fc_bias)
    t_n1 = torch.tanh(h_nd @ weights.gate_weight + weights.gate_bias)[:, None]
    normed_nd = F.layer_norm(t_n1 * h_nd + b.key_Bd[rows_B], shape, eps=eps)
    return _dot(normed_nd, a.target_Ad[rows_A]) + a.scalars_A7[rows_A, 6]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)
