"""The contrastive losses against the written-out formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.losses import contrastive_loss, drawn_negatives, joint_contrast_losses, triplet_losses


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


def random_pairs(num_mentions: int, num_entities: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_mentions, 4), (num_entities, 4)
    mentions, entities = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return mentions, entities


def test_joint_contrast_equals_a_twin_vector_by_vector() -> None:
    """Mentions 0 and 2 have one gold, which is there twice; two more entities are nobody's."""
    mentions, entities = random_pairs(3, 5)
    rows, column_M = [7, 8, 7, 1, 2], torch.arange(3)
    same_ME = torch.tensor([[rows[e] == rows[m] and e != m for e in range(5)] for m in range(3)])
    found = joint_contrast_losses(mentions, entities, column_M, same_ME, temperature=0.5, intra_weight=0.8)

    def cosine(x: Tensor, y: Tensor) -> float:
        return float(F.cosine_similarity(x, y, dim=0)) / 0.5

    for m in range(3):
        others_m = [n for n in range(3) if rows[n] != rows[m]]
        others_e = [e for e in range(5) if rows[e] != rows[m]]
        own = cosine(mentions[m], entities[m])
        forth = [own, *(cosine(mentions[m], entities[e]) for e in others_e)]
        forth += [0.0, *(0.8 * cosine(mentions[m], mentions[n]) for n in others_m)]
        back = [own, *(cosine(entities[m], mentions[n]) for n in others_m)]
        back += [0.0, *(0.8 * cosine(entities[m], entities[e]) for e in others_e)]
        losses = [float(torch.tensor(logits).logsumexp(0)) - own for logits in (forth, back)]
        assert float(found[m]) == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_gradients_of_joint_contrast_equal_finite_differences() -> None:
    same_ME = torch.zeros(3, 5, dtype=torch.bool)
    same_ME[0, 2] = same_ME[2, 0] = True

    def losses(mentions: Tensor, entities: Tensor) -> Tensor:
        return joint_contrast_losses(mentions, entities, torch.arange(3), same_ME, temperature=0.5, intra_weight=0.8)

    inputs = [each.requires_grad_() for each in random_pairs(3, 5)]
    assert torch.autograd.gradcheck(losses, inputs, fast_mode=True)


def test_joint_contrast_of_no_mention_is_nothing() -> None:
    """A worker's share of a small batch may be empty."""
    mentions, entities = (each.requires_grad_() for each in random_pairs(0, 5))
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bool)
    losses = joint_contrast_losses(mentions, entities, *none, temperature=0.5, intra_weight=0.8)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert entities.grad is not None
    assert not entities.grad.any()


@pytest.mark.parametrize("hardest", [True, False])
def test_triplets_are_hinges_over_other_golds(hardest: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    gold, excluded = torch.tensor([0, 3, 8, 2, 2, 5]), torch.rand(6, 9, generator=generator) < 0.4
    found = triplet_losses(scores, gold, excluded, margin=0.3, hardest=hardest)
    for mention in range(6):
        own = float(scores[mention, gold[mention]])
        hinges = [
            max(0.0, 0.3 + float(scores[mention, column]) - own)
            for column in range(9)
            if column != gold[mention] and not excluded[mention, column]
        ]
        assert float(found[mention]) == pytest.approx(max(hinges) if hardest else sum(hinges) / len(hinges))


def test_triplets_without_a_negative_cost_nothing() -> None:
    for hardest in (True, False):
        scores = torch.tensor([[0.2, 0.9]], requires_grad=True)
        loss = triplet_losses(scores, torch.tensor([0]), torch.tensor([[False, True]]), margin=0.5, hardest=hardest)
        assert not loss.any()
        loss.sum().backward()
        assert scores.grad is not None
        assert not scores.grad.any()


def test_negatives_are_wrong_and_drawn_by_their_scores() -> None:
    score_ME = torch.tensor([[9.0, 0.0, 0.0, math.log(3.0)]]).expand(4000, -1)
    is_gold_ME = torch.tensor([[True, False, False, False]]).expand(4000, -1)
    drawn_M = drawn_negatives(score_ME, is_gold_ME, torch.Generator().manual_seed(0))
    shares = drawn_M.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.2, 0.2, 0.6]), atol=0.03, rtol=0)
    assert drawn_negatives(score_ME[:0], is_gold_ME[:0], torch.Generator()).shape == (0,)
