"""Upper bounds of the text unit's token-level scores, so that pairs that cannot matter need not be computed.

A mention's context c is a mean of its values with weights that sum to one, whatever the attention says: a point of the
convex hull of its value rows v_j, centred over channels. `dsmip.ops.matching.local_scores` gives each pair

    local = <direction, c> / sqrt(|c|^2 / d + eps)

so that with a = max_j <direction, v_j>, which no <direction, c> exceeds, and norms s <= |c| <= r over the hull

    local <= a / sqrt(s^2 / d + eps)    where a > 0        local <= a / sqrt(r^2 / d + eps)    where a <= 0
    local <= |direction| sqrt(d)        (Cauchy-Schwarz: for hulls near the origin, where s is 0)

r = max_j |v_j|. s is `least_norm`: for any x and all c of the hull |c| |x| >= <c, x> >= min_j <v_j, x>, so every x
gives a lower bound of the least norm, the best one where x is the hull's point next to the origin.

Rounding: s is computed in float64, with 2^-40 r^2 taken off every dot product (their errors are some d 2^-53 r^2). In
the precision of the score, with unit roundoff u, the dot product of d terms errs by at most d u |direction| |v|, and
centring moves v by at most (d + 4) u |v| (v before it is centred); `local_bound` adds a little more than both.

N items, M mentions, E entities, T token places, d unit width.
"""

import torch
from torch import Tensor

_NUM_STEPS = 256


def least_norm(rows_NTd: Tensor, mask_NT: Tensor, num_steps: int = _NUM_STEPS) -> Tensor:
    """At most the least norm in the convex hull of each item's rows, float64 [N]; 0 when the origin is in the hull.

    rows_NTd: float [N, T, d]. mask_NT: bool, True for rows that count, at least one per item. NaN in, NaN out.

    Pairwise Frank-Wolfe steps (Mitchell, Demyanov, Malozemov 1974): weight goes from the row in use that is farthest
    along x to the one that is least far. More steps make the bound tighter; it holds after any number.

    >>> hulls = torch.tensor([[[1.0, 2.0], [1.0, -3.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    >>> least_norm(hulls, torch.ones(2, 2, dtype=torch.bool))
    tensor([1.0000, 0.0000], dtype=torch.float64)
    """
    rows_NTd = torch.where(mask_NT[..., None], rows_NTd.double(), 0.0)
    gram_NTT = rows_NTd @ rows_NTd.mT
    item_N1 = torch.arange(len(rows_NTd), device=rows_NTd.device)[:, None]
    slack_N1 = 2.0**-40 * gram_NTT.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    weight_NT = mask_NT.double() / mask_NT.sum(dim=1, keepdim=True)
    along_NT = (gram_NTT @ weight_NT[..., None])[..., 0]  # <v_j, x>
    best_N1 = torch.zeros_like(slack_N1)
    for _ in range(num_steps):
        least_N1, to_N1 = along_NT.masked_fill(~mask_NT, torch.inf).min(dim=1, keepdim=True)
        squared_N1 = (weight_NT * along_NT).sum(dim=1, keepdim=True)
        best_N1 = best_N1.maximum((least_N1 - slack_N1) / (squared_N1 + slack_N1).sqrt().clamp_min(tiny))
        most_N1, from_N1 = along_NT.masked_fill(weight_NT <= 0, -torch.inf).max(dim=1, keepdim=True)
        change_NT = (gram_NTT[item_N1, to_N1] - gram_NTT[item_N1, from_N1])[:, 0]
        curvature_N1 = change_NT.gather(1, to_N1) - change_NT.gather(1, from_N1)
        step_N1 = ((most_N1 - least_N1) / curvature_N1.clamp_min(tiny)).minimum(weight_NT.gather(1, from_N1))
        weight_NT = weight_NT.scatter_add(1, to_N1, step_N1).scatter_add(1, from_N1, -step_N1)
        along_NT = along_NT + step_N1 * change_NT
    return best_N1[:, 0]


def local_bound(
    value_MTd: Tensor,
    mask_MT: Tensor,
    least_norm_M: Tensor,
    direction_Ed: Tensor,
    eps: float,
    *,
    max_elements: int | None = None,
) -> Tensor:
    """At least what `dsmip.ops.matching.local_scores` is for any keys and queries, float [M, E] of the values' dtype.

    value_MTd: float [M, T, d], not yet centred. mask_MT: bool, True for real tokens, which come first, at least one per
    mention. least_norm_M: `least_norm` of the centred values. direction_Ed and eps: as in `local_scores`. NaN in, NaN
    out. max_elements: of products that exist at a time (default: what suits the device).

    >>> one_token = torch.tensor([[[3.0, 1.0]]])
    >>> directions = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    >>> local_bound(one_token, torch.ones(1, 1, dtype=torch.bool), torch.tensor([2.0**0.5]), directions, 0.0)
    tensor([[ 2.0000, -2.0000]])
    """
    d, rounding = value_MTd.shape[-1], torch.finfo(value_MTd.dtype).eps
    centred_MTd = value_MTd - value_MTd.mean(dim=-1, keepdim=True)
    centred_MTd = torch.where(mask_MT[..., None], centred_MTd, centred_MTd[:, :1])
    norms = torch.linalg.vector_norm
    slack_M = (d + 4) * rounding * torch.where(mask_MT, norms(value_MTd, dim=-1, dtype=torch.float64), 0.0).amax(dim=1)
    largest_norm_M = norms(centred_MTd, dim=-1, dtype=torch.float64).amax(dim=1) + slack_M
    direction_norm_E = norms(direction_Ed, dim=-1, dtype=torch.float64)

    highest_ME = _highest_products(centred_MTd, mask_MT.sum(dim=1), direction_Ed, max_elements)
    highest_ME += torch.outer(slack_M, direction_norm_E).to(highest_ME.dtype)
    by_least_M, by_largest_M = (
        (norm_M.double().square() / d + eps).rsqrt().to(highest_ME.dtype) for norm_M in (least_norm_M, largest_norm_M)
    )
    bound_ME = highest_ME * torch.where(highest_ME > 0, by_least_M[:, None], by_largest_M[:, None])
    bound_ME = bound_ME.minimum((d**0.5 * direction_norm_E).to(bound_ME.dtype))
    return bound_ME + 8 * rounding * bound_ME.abs()


def _highest_products(centred_MTd: Tensor, length_M: Tensor, direction_Ed: Tensor, max_elements: int | None) -> Tensor:
    """max over tokens of <direction, value> [M, E], mentions of like length together."""
    if max_elements is None:
        max_elements = 2**20 if centred_MTd.device.type == "cpu" else 2**27
    num_mentions, num_tokens, _ = centred_MTd.shape
    size = max(max_elements // max(num_tokens * len(direction_Ed), 1), 1)
    longest_first_M = length_M.argsort(descending=True)
    highest_ME = direction_Ed.new_empty(num_mentions, len(direction_Ed))
    for start in range(0, num_mentions, size):
        rows_m = longest_first_M[start : start + size]
        longest = max(int(length_M[rows_m[0]]), 1)
        highest_ME[rows_m] = (centred_MTd[rows_m, :longest] @ direction_Ed.T).amax(dim=1)
    return highest_ME
