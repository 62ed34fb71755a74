"""The fused vectors of the cross unit (MIMIC: Luo et al., KDD 2023, section 4.4).

N items, P picture tokens, d unit width. Differentiable; the inputs' dtype is kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attended(query_Nd: Tensor, tokens_NPd: Tensor, mask_NP: Tensor | None = None) -> Tensor:
    """Unscaled softmax attention of one vector over an item's tokens, float [N, d].

    Args:
        mask_NP: bool, True for real tokens, at least one per item (None: all).

    >>> attended(torch.zeros(1, 1), torch.tensor([[[2.0], [4.0]]]))
    tensor([[3.]])
    """
    logits_NP = torch.einsum("nd,npd->np", query_Nd, tokens_NPd)
    if mask_NP is not None:
        logits_NP = logits_NP.masked_fill(~mask_NP, -torch.inf)
    return torch.einsum("np,npd->nd", torch.softmax(logits_NP, dim=-1), tokens_NPd)


def cross_vector(
    text_Nd: Tensor,
    tokens_NPd: Tensor,
    mask_NP: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """One side of U_C, float [N, d]: LN(tanh(w text + b) text + context); S_C is the dot product of two sides.

    The context is unscaled softmax attention of the text over the picture tokens.

    Args:
        mask_NP: bool, True for real tokens, at least one per item (None: all).
        gate_weight, gate_bias: [1, d] and [1], the linear map to the gate.

    >>> text = torch.tensor([[1.0, 3.0]])
    >>> cross_vector(text, text[None], None, torch.zeros(1, 2), torch.zeros(1), torch.ones(2), torch.zeros(2), 0.0)
    tensor([[-1.,  1.]])
    """
    context_Nd = attended(text_Nd, tokens_NPd, mask_NP)
    gate_N1 = torch.tanh(F.linear(text_Nd, gate_weight, gate_bias))
    return F.layer_norm(gate_N1 * text_Nd + context_Nd, norm_weight.shape, norm_weight, norm_bias, eps)
