"""Matching of two sequences and pooling at several temperatures (M3EL: Hu et al., KDD 2025; its cross unit).

N items, P and Q tokens of two sequences, d unit width. Differentiable; the inputs' dtype is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURES = (2.0, 2.5, 3.5, 4.5)
"""Of the heads of `pooled_by_temperature`, as published."""


def match(tokens_NPd: Tensor, keys_NQd: Tensor, mask_NQ: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(W softmax(p (W q)^T) q), what each token p finds among the keys q: float [N, P, d].

    W q is weight q + bias, the same map inside and outside. Of a single key the softmax is 1: every token then has the
    same row ReLU(W q), whatever it is.

    Args:
        mask_NQ: bool, True for real keys, at least one per item (None: all).

    >>> tokens, keys = torch.tensor([[[9.0, 9.0], [0.0, 0.0]]]), torch.tensor([[[1.0, -2.0]]])
    >>> match(tokens, keys, None, torch.eye(2), torch.zeros(2))
    tensor([[[1., 0.],
             [1., 0.]]])
    """
    logits_NPQ = tokens_NPd @ F.linear(keys_NQd, weight, bias).transpose(1, 2)
    if mask_NQ is not None:
        logits_NPQ = logits_NPQ.masked_fill(~mask_NQ[:, None], -torch.inf)
    return F.relu(F.linear(torch.softmax(logits_NPQ, dim=-1) @ keys_NQd, weight, bias))


def pooled_by_temperature(
    tokens_NPd: Tensor, mask_NP: Tensor | None = None, temperatures: Sequence[float] = TEMPERATURES
) -> Tensor:
    """Mean over heads of (mean token + head's token), channel by channel: float [N, d].

    One head for each temperature T, the sum of tokens weighted by softmax(T x) over them, and one that takes the
    largest.

    Args:
        mask_NP: bool, True for real tokens, at least one per item (None: all).

    >>> pooled_by_temperature(torch.tensor([[[0.0], [4.0]]]), temperatures=())
    tensor([[6.]])
    >>> pooled_by_temperature(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[True, False]]))
    tensor([[0.]])
    """
    if mask_NP is None:
        mask_NP = tokens_NPd.new_ones(tokens_NPd.shape[:2], dtype=torch.bool)
    real_NP1 = mask_NP[..., None]
    mean_Nd = tokens_NPd.where(real_NP1, 0.0).sum(dim=1) / real_NP1.sum(dim=1)
    heads = [tokens_NPd.where(real_NP1, -torch.inf).amax(dim=1)]
    for temperature in temperatures:
        weight_NPd = (temperature * tokens_NPd).where(real_NP1, -torch.inf).softmax(dim=1)
        heads.append((weight_NPd * tokens_NPd.where(real_NP1, 0.0)).sum(dim=1))
    return mean_Nd + torch.stack(heads).mean(dim=0)
