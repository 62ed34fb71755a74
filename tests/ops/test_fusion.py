"""The fitted scale and the fusions of experts, against the plain formulas in float64."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.experts.fusion import (
    fit_scale,
    mixture_losses,
    mixture_scores,
    product_losses,
    product_scores,
    with_rivals,
)


def negative_log_likelihood(scores_ME: Tensor, gold_column_M: Tensor, scale: float) -> float:
    log_p_ME = torch.log_softmax(scores_ME.double() * scale, dim=1)
    return -float(log_p_ME.gather(1, gold_column_M[:, None]).sum())


@given(st.integers(2, 30), st.integers(2, 20), st.floats(0.05, 20), st.integers(0, 10**6))
@example(2, 19, 7.0, 632)  # near the least scale
def test_no_other_scale_is_likelier(num_mentions: int, num_entities: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gold_column_M = torch.randint(num_entities, (num_mentions,), generator=generator)
    scores_ME = spread * torch.randn(num_mentions, num_entities, generator=generator)
    scores_ME[torch.arange(num_mentions), gold_column_M] += spread  # right more often than not
    best = fit_scale(scores_ME, gold_column_M)
    found = negative_log_likelihood(scores_ME, gold_column_M, best)
    for other in (best * 0.98, best * 1.02, best * 0.5, best * 2):
        if 1e-3 < other < 1e3:
            assert found <= negative_log_likelihood(scores_ME, gold_column_M, other) + 1e-9 * abs(found)


def test_a_scale_by_hand_and_its_bounds() -> None:
    scores_ME = torch.tensor([[4.0, 0.0]]).expand(5, 2)
    four_of_five = torch.tensor([0, 0, 0, 0, 1])
    assert fit_scale(scores_ME, four_of_five) == pytest.approx(math.log(4) / 4, abs=1e-3)
    assert fit_scale(scores_ME, torch.zeros(5, dtype=torch.int64)) == pytest.approx(1e3, rel=1e-3)  # all right
    assert fit_scale(scores_ME, torch.ones(5, dtype=torch.int64)) == pytest.approx(1e-3, rel=1e-3)  # all wrong
    with pytest.raises(ValueError, match="no mentions"):
        fit_scale(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_scaled_scores_have_the_scale_taken_out() -> None:
    generator = torch.Generator().manual_seed(3)
    scores_ME, gold_M = torch.randn(40, 9, generator=generator), torch.randint(9, (40,), generator=generator)
    scores_ME[torch.arange(40), gold_M] += 1.5
    once = fit_scale(scores_ME, gold_M)
    assert fit_scale(scores_ME * 8, gold_M) == pytest.approx(once / 8, rel=2e-3)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_fusions_are_sums_over_experts(num_experts: int, num_mentions: int, num_entities: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p_BME = torch.log_softmax(
        4 * torch.randn(num_experts, num_mentions, num_entities, generator=generator, dtype=torch.float64), dim=-1
    )
    log_pi_MB = torch.log_softmax(torch.randn(num_mentions, num_experts, generator=generator, dtype=torch.float64), -1)
    mixed_ME, product_ME = mixture_scores(log_p_BME, log_pi_MB), product_scores(log_p_BME, log_pi_MB)
    for m in range(num_mentions):
        for e in range(num_entities):
            shares = [(float(log_pi_MB[m, b].exp()), float(log_p_BME[b, m, e])) for b in range(num_experts)]
            assert float(mixed_ME[m, e]) == pytest.approx(math.log(sum(pi * math.exp(p) for pi, p in shares)))
            assert float(product_ME[m, e]) == pytest.approx(sum(pi * p for pi, p in shares))
    torch.testing.assert_close(mixed_ME.exp().sum(dim=1), torch.ones(num_mentions, dtype=torch.float64))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6))
def test_losses_are_those_of_the_fusions(num_experts: int, num_mentions: int, num_entities: int, seed: int) -> None:
    """The gold comes first; the product's powers are the exponentials of the logits, whatever they add up to."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_mentions, num_entities, num_experts)
    log_p_MKB = torch.log_softmax(4 * torch.randn(shape, generator=generator, dtype=torch.float64), dim=1)
    logits_MB = torch.randn(num_mentions, num_experts, generator=generator, dtype=torch.float64)
    mixed_M, product_M = mixture_losses(logits_MB, log_p_MKB[:, 0]), product_losses(logits_MB, log_p_MKB)
    for m in range(num_mentions):
        power_B = [math.exp(float(logit)) for logit in logits_MB[m]]
        p_KB = [[math.exp(float(log_p)) for log_p in log_p_B] for log_p_B in log_p_MKB[m]]
        mixture = sum(power * p for power, p in zip(power_B, p_KB[0], strict=True)) / sum(power_B)
        assert float(mixed_M[m]) == pytest.approx(-math.log(mixture), abs=1e-9)
        product_K = [math.prod(p**power for power, p in zip(power_B, p_B, strict=True)) for p_B in p_KB]
        assert float(product_M[m]) == pytest.approx(-math.log(product_K[0] / sum(product_K)), abs=1e-6)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))
def test_rivals_are_the_best_others(
    num_experts: int, num_mentions: int, num_entities: int, num_rivals: int, seed: int
) -> None:
    """Also where the gold is far from the best, and where there are fewer others, or none."""
    generator = torch.Generator().manual_seed(seed)
    log_p_BME = torch.randn(num_experts, num_mentions, num_entities, generator=generator).log_softmax(dim=-1)
    gold_M = torch.randint(num_entities, (num_mentions,), generator=generator)
    found_MKB = with_rivals(log_p_BME, gold_M, num_rivals)
    assert found_MKB.shape == (num_mentions, 1 + min(num_rivals, num_entities - 1), num_experts)
    for m, gold in enumerate(gold_M.tolist()):
        others = sorted((e for e in range(num_entities) if e != gold), key=lambda e: -float(log_p_BME[:, m, e].sum()))
        expected_KB = log_p_BME[:, m, [gold, *others[:num_rivals]]].T
        assert torch.equal(found_MKB[m], expected_KB)
