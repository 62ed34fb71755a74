"""The dual unit as the paper writes it, with random weights and items."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.visual_unit import DualWeights


def random_weights(d: int, seed: int = 0) -> DualWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fc, gate = normal(d, d) / d**0.5, normal(d) / d**0.5
    return DualWeights(
        1 + 0.3 * normal(d),
        0.3 * normal(d),
        fc,
        0.3 * normal(d),
        gate,
        normal(1)[0],
        1 + 0.3 * normal(d),
        normal(d),
        1e-5,
    )


def direct(query_Ad: Tensor, value_Bd: Tensor, key_Bd: Tensor, w: DualWeights) -> Tensor:
    d = w.fc_bias.shape
    added = F.layer_norm(query_Ad[:, None] + value_Bd, d, w.add_norm_weight, w.add_norm_bias, w.eps)
    h = F.linear(added, w.fc_weight, w.fc_bias)
    t = torch.tanh(h @ w.gate_weight + w.gate_bias)
    left = F.layer_norm(t[..., None] * h + key_Bd, d, w.norm_weight, w.norm_bias, w.eps)
    return (left * F.layer_norm(query_Ad, d, w.norm_weight, w.norm_bias, w.eps)[:, None]).sum(-1)


def random_items(d: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, value, key = (torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5 for n in (9, 11, 11))
    return query, value, key
