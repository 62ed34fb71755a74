"""The contrastive loss against the written-out formula."""

import math

import pytest
import torch

from dsmip.ops.losses import contrastive_loss


def test_equals_the_formula_with_excluded_pairs_left_out() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]], dtype=torch.float64)
    gold = torch.tensor([1, 2])
    excluded = torch.tensor([[False, False, True], [False, False, False]])
    first = -2 + math.log(math.exp(1) + math.exp(2))
    second = -0.5 + math.log(math.exp(0) + math.exp(-1) + math.exp(0.5))
    assert float(contrastive_loss(scores, gold, excluded)) == pytest.approx(first + second)
    assert float(contrastive_loss(scores[1:], gold[1:])) == pytest.approx(second)


def test_an_excluded_pair_gets_no_gradient_and_the_gold_always_does() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    contrastive_loss(scores, torch.tensor([0]), torch.tensor([[True, False, True]])).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-0.5, 0.5, 0.0]]


def test_large_scores_do_not_overflow() -> None:
    assert float(contrastive_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))) == pytest.approx(2e4)
