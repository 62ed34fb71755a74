"""Scores of the text unit (MIMIC: Luo et al., KDD 2023, section 4.2).

M mentions, E entities, T mention text tokens, S entity text tokens, z global text width, d unit width. Lower-case
m, e, t, s are blocks of the same. All functions are differentiable and keep their inputs' dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def with_global(
    local_ME: Tensor, global_Mz: Tensor, global_Ez: Tensor, local_query_Ed: Tensor, norm_bias: Tensor
) -> Tensor:
    """U_T: half of <t_m, t_e> + <W_c t_e, LN(mean over s of softmax(q_s K^T) V)>, float [M, E].

    Args:
        local_ME: `local_scores` with the directions W_c t_e * norm_weight.
        local_query_Ed: W_c t_e.
        norm_bias: [d], the LayerNorm's.

    >>> key, value, query = torch.ones(1, 1, 2), torch.tensor([[[3.0, 1.0]]]), torch.ones(1, 1, 2)
    >>> local_query, weight, bias = torch.tensor([[1.0, 0.0]]), torch.ones(2), torch.zeros(2)
    >>> local = local_scores(key, value, None, query, None, local_query * weight, 0.0)
    >>> with_global(local, key[0], query[0], local_query, bias)
    tensor([[1.5000]])
    """
    return (global_Mz @ global_Ez.T + local_ME + local_query_Ed @ norm_bias) / 2


def local_scores(
    key_MTd: Tensor,
    value_MTd: Tensor,
    mask_MT: Tensor | None,
    query_ESd: Tensor,
    mask_ES: Tensor | None,
    direction_Ed: Tensor,
    eps: float,
    *,
    max_elements: int | None = None,
    kept_elements: int = 2**26,
) -> Tensor:
    """<direction_e, c / sd(c)> with c = mean over s of softmax(q_s K^T) V, V centred over channels; float [M, E].

    query_ESd must already be divided by sqrt(d). mask_MT and mask_ES are bool, True for real tokens, at least one per
    item; None: all are real. eps is the LayerNorm's. `dsmip.ops.kernels.cpu` and `.cuda` have the same in C++ and
    Triton.

    The mean over s is taken of the attention before it meets the values, so nothing of size [M, E, S, d] exists. Pairs
    are handled in blocks of items of like length whose [e, s, m, t] attention has at most `max_elements` elements (or
    is one pair; default: what suits the device). The backward pass needs all attention: up to `kept_elements` it is
    kept, beyond that each block's is computed again.
    """
    if max_elements is None:
        max_elements = 2**20 if key_MTd.device.type == "cpu" else 2**26  # a CPU's cache; a fraction of a GPU's memory
    order_M, blocks_M = _blocks_by_length(mask_MT, key_MTd, int(max_elements**0.5))
    order_E, blocks_E = _blocks_by_length(
        mask_ES, query_ESd, max_elements // max((m * t for m, t in blocks_M), default=1)
    )

    if not (blocks_M and blocks_E):
        return key_MTd.new_zeros(len(key_MTd), len(query_ESd))  # no pair

    bias_MT = torch.zeros_like(key_MTd[..., 0]) if mask_MT is None else torch.where(mask_MT, 0.0, -torch.inf)
    weight_ES = torch.ones_like(query_ESd[..., 0]) if mask_ES is None else mask_ES.to(query_ESd.dtype)
    centred_MTd = value_MTd - value_MTd.mean(dim=-1, keepdim=True)
    mean_weight_ES = weight_ES / weight_ES.sum(dim=1, keepdim=True)
    mention_side = [_cut(x[order_M], blocks_M) for x in (key_MTd, centred_MTd, bias_MT.to(key_MTd.dtype))]
    entity_side = [_cut(x[order_E], blocks_E) for x in (query_ESd, mean_weight_ES)]
    directions = direction_Ed[order_E].split([e for e, _ in blocks_E])

    num_elements = sum(m * t for m, t in blocks_M) * sum(e * s for e, s in blocks_E)
    keep = num_elements <= kept_elements or not torch.is_grad_enabled()
    of_block = _local_scores if keep else _recomputed_local_scores
    strips = []
    for mentions in zip(*mention_side, strict=True):
        entities = zip(*entity_side, directions, strict=True)
        strips.append(torch.cat([of_block(eps, *mentions, *block) for block in entities], dim=1))
    return torch.cat(strips)[order_M.argsort()][:, order_E.argsort()]


def _blocks_by_length(
    mask_NT: Tensor | None, tokens_NTd: Tensor, max_tokens: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Items from longest to shortest (int64 [N]) and the blocks they are cut into: (number of items, longest length).

    A block has at most `max_tokens` token places, or one item.
    """
    num_items, num_tokens = tokens_NTd.shape[:2]
    if mask_NT is None:
        order_N, lengths = (
            torch.arange(num_items, device=tokens_NTd.device),
            [num_tokens] * num_items,
        )
    else:
        ends_N = (mask_NT * torch.arange(1, num_tokens + 1, device=mask_NT.device)).amax(dim=1)
        sorted_N, order_N = ends_N.sort(descending=True, stable=True)
        lengths = sorted_N.tolist()
    blocks, start = [], 0
    while start < num_items:
        longest = max(lengths[start], 1)
        size = min(max(max_tokens // longest, 1), num_items - start)
        blocks.append((size, longest))
        start += size
    return order_N, blocks


def _cut(items_NT: Tensor, blocks: list[tuple[int, int]]) -> list[Tensor]:
    """The blocks of items that are in order, each without the token places that it does not use."""
    sizes = [size for size, _ in blocks]
    return [block[:, :longest] for block, (_, longest) in zip(items_NT.split(sizes), blocks, strict=True)]


def _recomputed_local_scores(eps: float, *block: Tensor) -> Tensor:
    """`_local_scores` that saves only its inputs for the backward pass."""
    scores: Tensor = checkpoint(_local_scores, eps, *block, use_reentrant=False, preserve_rng_state=False)
    return scores


def _local_scores(
    eps: float,
    key_mtd: Tensor,
    centred_mtd: Tensor,
    bias_mt: Tensor,
    query_esd: Tensor,
    weight_es: Tensor,
    direction_ed: Tensor,
) -> Tensor:
    """<direction, context / sd(context)> [m, e]; values are centred over channels, hence so is their mean."""
    (m, t, d), (e, s, _) = key_mtd.shape, query_esd.shape
    logits = F.linear(query_esd.reshape(e * s, d), key_mtd.reshape(m * t, d), bias_mt.reshape(m * t))
    attention = torch.softmax(logits.view(e * s, m, t), dim=-1)
    mean_emt = torch.bmm(weight_es[:, None], attention.view(e, s, m * t)).view(e, m, t)
    context_med = torch.bmm(mean_emt.transpose(0, 1), centred_mtd)
    projection_me = torch.einsum("med,ed->me", context_med, direction_ed)
    return projection_me * (context_med.square().mean(dim=-1) + eps).rsqrt()
