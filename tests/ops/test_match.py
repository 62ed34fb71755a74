"""M3EL's matching and pooling against twins that go through tokens one by one, and their gradients."""

import pytest
import torch
from torch import Tensor

from dsmip.ops.match import match, pooled_by_temperature


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])


@pytest.mark.parametrize("masked", [True, False])
def test_match_equals_a_twin_token_by_token(masked: bool) -> None:
    tokens, keys, weight, bias = randn(3, 2, 5), randn(3, 4, 5, seed=1), randn(5, 5, seed=2), randn(5, seed=3)
    found = match(tokens, keys, MASK if masked else None, weight, bias)
    for item in range(3):
        real = [q for q in range(4) if not masked or MASK[item, q]]
        for place in range(2):
            logits = torch.stack([tokens[item, place] @ (weight @ keys[item, q] + bias) for q in real])
            share = logits.exp() / logits.exp().sum()
            mean = sum((s * keys[item, q] for s, q in zip(share, real, strict=True)), torch.zeros(5))
            torch.testing.assert_close(found[item, place], (weight @ mean + bias).clamp_min(0))


@pytest.mark.parametrize("masked", [True, False])
def test_pooling_equals_a_twin_channel_by_channel(masked: bool) -> None:
    tokens, temperatures = randn(3, 4, 5), (2.0, 4.5)
    found = pooled_by_temperature(tokens, MASK if masked else None, temperatures)
    for item in range(3):
        real = MASK[item] if masked else torch.ones(4, dtype=torch.bool)
        for channel in range(5):
            x = tokens[item, real, channel]
            heads = [float(x.max())]
            for temperature in temperatures:
                weight = (temperature * x).exp()
                heads.append(float((weight * x).sum() / weight.sum()))
            assert float(found[item, channel]) == pytest.approx(float(x.mean()) + sum(heads) / 3)


def test_gradients_equal_finite_differences() -> None:
    def both(tokens: Tensor, keys: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found = match(tokens, keys, MASK, weight, bias)
        return pooled_by_temperature(torch.cat([found, keys], dim=1))

    inputs = [randn(3, 2, 4), randn(3, 4, 4, seed=1), randn(4, 4, seed=2), randn(4, seed=3)]
    assert torch.autograd.gradcheck(both, [each.requires_grad_() for each in inputs], fast_mode=True)
