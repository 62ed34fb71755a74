"""The five-product dual unit against a twin that builds every [A, B, d] tensor, in both precisions and cancelling."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.visual_unit import DualWeights, dual_unit, query_side, value_side
from tests.support.scoring.dual_units import direct, random_items, random_weights


def ours(query_Ad: Tensor, value_Bd: Tensor, key_Bd: Tensor, w: DualWeights) -> Tensor:
    return dual_unit(query_side(query_Ad, w), value_side(value_Bd, key_Bd, w), w)


def single(w: DualWeights) -> DualWeights:
    return w._replace(**{name: x.float() for name, x in w._asdict().items() if name != "eps"})


def cancelling_items(d: int, w: DualWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Values near -query (pairs 0 to 4: relative distance 0 to 1e-1), a key that nearly undoes t h (pair 5)."""
    query, value, key = random_items(d, seed=2)
    for n, distance in enumerate((0.0, 1e-6, 1e-4, 1e-2, 1e-1)):
        value[n] = -query[n] + distance * value[n]
    added = F.layer_norm(query[5] + value[5], (d,), w.add_norm_weight, w.add_norm_bias, w.eps)
    h = F.linear(added, w.fc_weight, w.fc_bias)
    key[5] = -torch.tanh(h @ w.gate_weight + w.gate_bias) * h + 1e-3 * key[5]
    return query, value, key


def test_equals_the_direct_form_in_float64() -> None:
    w = random_weights(16)
    torch.testing.assert_close(ours(*random_items(16), w), direct(*random_items(16), w), atol=1e-11, rtol=1e-11)
    items = cancelling_items(16, w)
    torch.testing.assert_close(ours(*items, w), direct(*items, w), atol=1e-9, rtol=1e-9)


def test_float32_errs_no_more_than_the_direct_form_does() -> None:
    w = random_weights(96)
    for items in (random_items(96), cancelling_items(96, w)):
        exact = direct(*items, w)
        query, value, key = (x.float() for x in items)
        error = (ours(query, value, key, single(w)).double() - exact).abs().max()
        twin_error = (direct(query, value, key, single(w)).double() - exact).abs().max()
        assert error <= 3 * twin_error
        assert error < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("cancelling", [False, True])
def test_gradients_equal_those_of_the_direct_form(cancelling: bool) -> None:
    w = random_weights(8)
    items = cancelling_items(8, w) if cancelling else random_items(8)
    leaves = [x.requires_grad_() for x in (*items, *w[:-1])]
    weights_AB = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((ours(*items, w) * weights_AB).sum(), leaves)
    expected = torch.autograd.grad((direct(*items, w) * weights_AB).sum(), leaves)
    for our, twin in zip(got, expected, strict=True):
        torch.testing.assert_close(our, twin, atol=1e-7, rtol=1e-7)


def test_zero_vectors_give_finite_scores_and_gradients() -> None:
    w = single(random_weights(8))
    query, value, key = (torch.zeros(n, 8, requires_grad=True) for n in (2, 3, 3))
    scores_AB = ours(query, value, key, w)
    torch.testing.assert_close(scores_AB, direct(query, value, key, w))
    gradients = torch.autograd.grad(scores_AB.sum(), (query, value, key))
    assert all(bool(x.isfinite().all()) for x in gradients)


def test_no_items_give_no_scores() -> None:
    w = random_weights(8)
    query, value, key = random_items(8)
    assert ours(query[:0], value, key, w).shape == (0, 11)
    assert ours(query, value[:0], key[:0], w).shape == (9, 0)
