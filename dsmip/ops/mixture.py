"""Gates of a mixture of experts: which of them see a token, and with what share (MMoE, 2025).

N items, S places of a sequence, K experts. Differentiable; the inputs' dtype is kept.
"""

import torch
from torch import Tensor

_SMALLEST = 1e-6


def gates_per_token(logits_RK: Tensor, num_kept: int) -> Tensor:
    """Softmax over experts, of which each row keeps the largest, whose sum is 1 again: float [..., K].

    >>> gates_per_token(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]]).exp().log(), 1)
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    share_RK = torch.softmax(logits_RK, dim=-1)
    kept_RK = torch.zeros_like(share_RK, dtype=torch.bool).scatter(-1, share_RK.topk(num_kept, dim=-1).indices, True)
    kept_share_RK = share_RK.where(kept_RK, 0.0)
    return kept_share_RK / kept_share_RK.sum(dim=-1, keepdim=True)


def gates_as_published(logits_NSK: Tensor, num_kept: int) -> Tensor:
    """The released gates, float [N, S, K], which depend on all N items: a fault, kept for comparison alone.

    The numbers of the kept experts are taken for places of the sequence: place p is alive for slot j < `num_kept` if
    expert p is any place's j-th best. Then shares are divided by their sum over the batch, and multiplied by its size.

    >>> logits = torch.tensor([[[5.0, 0.0], [5.0, 0.0], [5.0, 0.0]]])
    >>> gates_as_published(logits, 1)[0].round(decimals=2)
    tensor([[1., 0.],
            [0., 0.],
            [0., 0.]])
    """
    share_NSK = torch.softmax(logits_NSK, dim=-1)
    best_NSk = share_NSK.topk(num_kept, dim=-1).indices
    alive_NSK = torch.zeros_like(share_NSK).scatter(1, best_NSk, 1.0)
    alive_share_NSK = share_NSK * alive_NSK
    return alive_share_NSK / (alive_share_NSK.sum(dim=0, keepdim=True) + _SMALLEST) * len(logits_NSK)
