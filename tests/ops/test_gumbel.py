"""Gumbel noise and the two forms of the expert choice."""

import math

import pytest
import torch

from dsmip.ops.gumbel import hard_choice, relaxed_choice, sample_gumbel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_has_the_gumbel_mean_and_variance_and_repeats_with_its_seed() -> None:
    noise = sample_gumbel((200_000,), generator())
    assert noise.dtype == torch.float32
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert torch.equal(noise, sample_gumbel((200_000,), generator()))


def test_noisy_choices_follow_pi() -> None:
    pi = torch.tensor([0.6, 0.3, 0.1])
    noise = sample_gumbel((100_000, 3), generator(1))
    share = hard_choice(pi.log().expand_as(noise), noise, 0.1).mean(0)
    torch.testing.assert_close(share, pi, atol=0.01, rtol=0)


def test_relaxed_choice_divides_the_noisy_logits_by_tau() -> None:
    log_pi, noise = torch.tensor([0.1, -0.4]), torch.tensor([0.3, 0.2])
    odds = math.exp((0.4 - -0.2) / 0.5)
    expected = torch.tensor([odds / (1 + odds), 1 / (1 + odds)])
    torch.testing.assert_close(relaxed_choice(log_pi, noise, 0.5), expected)


def test_hard_choice_is_exactly_one_hot_and_has_the_relaxed_gradient() -> None:
    log_pi = torch.randn(50, 4, 3, generator=generator()).requires_grad_()
    noise = sample_gumbel((50, 4, 3), generator(1))
    weights = torch.randn(50, 4, 3, generator=generator(2))
    hard = hard_choice(log_pi, noise, 0.3)
    assert set(hard.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(50, 4))
    assert torch.equal(hard.argmax(-1), (log_pi + noise).argmax(-1))
    (through,) = torch.autograd.grad((hard * weights).sum(), log_pi)
    (relaxed,) = torch.autograd.grad((relaxed_choice(log_pi, noise, 0.3) * weights).sum(), log_pi)
    torch.testing.assert_close(through, relaxed)


def test_ties_go_to_the_first_expert() -> None:
    choice = hard_choice(torch.tensor([[0.0, 0.0, 0.0], [-1.0, 2.0, 2.0]]), None, 0.1)
    assert choice.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_tiny_tau_still_takes_the_largest_logit() -> None:
    assert hard_choice(torch.tensor([1.0, 1.0001, 1.00005]), None, 1e-12).tolist() == [0, 1, 0]


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_tau_must_be_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        relaxed_choice(torch.zeros(2), None, tau)
