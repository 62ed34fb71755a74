"""The contract of `dsmip.models.base` for training: what a loss is a sum of, and what it trains."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmip.config import TrainConfig
from dsmip.data.table import Table, concatenate
from dsmip.training.batches import Step
from dsmip.training.gradients import batch_backward
from dsmip.units.matcher import BatchGold, PairedItems
from tests.support.scoring.contract import CPU, Subject, seeded


def loss_of(subject: Subject, features: tuple[Table, Table], rows_M: list[int], gold_rows: list[int]) -> Tensor:
    """Loss of some mentions against as many entities, of which the n-th is the n-th mention's gold."""
    gold_M = torch.tensor(gold_rows)
    gold = BatchGold.from_rows(gold_M, gold_M, torch.arange(len(rows_M)))
    columns = features[1].take(torch.arange(len(rows_M)))
    with seeded(4):
        loss: Tensor = subject.matcher(features[0].take(torch.tensor(rows_M)), columns, gold)
    return loss


@torch.no_grad()
def test_pairs_with_the_same_gold_are_no_negatives(subject: Subject, features: tuple[Table, Table]) -> None:
    loss = float(loss_of(subject, features, [0, 1, 2], [5, 5, 5]))
    if subject.matcher.loss_is_of_whole_batch:  # what a mention has beside its negatives remains
        columns = features[1].take(torch.arange(3))
        alone = BatchGold(torch.tensor([0]), torch.zeros(1, 1, dtype=torch.bool))
        sides = [(features[0].take(slice(n, n + 1)), columns.take(slice(n, n + 1))) for n in range(3)]
        assert loss == pytest.approx(sum(float(subject.matcher(*side, alone)) for side in sides), abs=1e-4)
    else:
        assert loss == 0.0
    assert float(loss_of(subject, features, [0, 1, 2], [5, 6, 7])) > 1e-3


@torch.no_grad()
def test_loss_is_a_sum_over_mentions(subject: Subject, features: tuple[Table, Table]) -> None:
    """And of each mention over its own negatives alone: gathered batches and micro-batches rely on it."""
    if subject.draws_noise:
        pytest.skip("its loss draws noise per pair")
    if subject.matcher.loss_is_of_whole_batch:
        pytest.skip("its loss contrasts mentions with mentions")
    gold_M = torch.tensor([4, 8, 4, 2])
    expected = torch.zeros(())
    for mention in range(4):
        columns = [n for n in range(4) if n == mention or gold_M[n] != gold_M[mention]]
        gold = BatchGold(torch.tensor([columns.index(mention)]), torch.zeros(1, len(columns), dtype=torch.bool))
        rows = torch.tensor(columns)
        expected += subject.matcher(features[0].take(slice(mention, mention + 1)), features[1].take(rows), gold)
    torch.testing.assert_close(
        loss_of(subject, features, [0, 1, 2, 3], gold_M.tolist()), expected, atol=5e-3, rtol=1e-4
    )


@torch.no_grad()
def test_a_loss_takes_entities_that_were_prepared_apart(subject: Subject, features: tuple[Table, Table]) -> None:
    """As several workers do, one of which has none."""
    gold_M, matcher = torch.tensor([4, 8, 4, 2]), subject.matcher
    shares = [features[1].take(slice(*bounds)) for bounds in ((0, 3), (3, 3), (3, 4))]
    with seeded(4):
        mentions = matcher.loss_mentions(features[0].take(torch.arange(4)))
        entities = concatenate([matcher.loss_entities(share) for share in shares])
        loss = matcher.loss(mentions, entities, BatchGold.from_rows(gold_M, gold_M, torch.arange(4)))
    expected = loss_of(subject, features, [0, 1, 2, 3], gold_M.tolist())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_a_step_takes_features_of_half_precision(subject: Subject, features: tuple[Table, Table]) -> None:
    matcher = subject.matcher
    trains_towers = bool(matcher.pretrained_towers()) and matcher.encoder_trains()
    if matcher.reads_items or trains_towers or not any(p.requires_grad for p in matcher.parameters()):
        pytest.skip("it trains on no stored features")
    halves = [each.take(torch.arange(4)).cast(torch.float16) for each in features]
    with seeded(4):
        step = Step(halves[0], halves[1], torch.arange(4), torch.arange(4))
        loss = batch_backward(matcher, step, TrainConfig(), CPU)
    gradients = [parameter.grad for parameter in matcher.parameters() if parameter.grad is not None]
    assert loss.mean > 0
    assert gradients
    assert all(gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) for gradient in gradients)
    matcher.zero_grad(set_to_none=True)


def test_every_trainable_parameter_gets_a_gradient(subject: Subject) -> None:
    trained = {name: p for name, p in subject.matcher.named_parameters() if p.requires_grad}
    if not trained:
        pytest.skip("without its towers it compares features as they are")
    few = replace(
        subject.sample,
        mentions=subject.sample.mentions.rows(0, 4),
        entities=subject.sample.entities.rows(0, 4),
    )
    mentions, entities = subject.encode(few.mentions, few.entities)
    gold = BatchGold.from_rows(torch.arange(4), torch.arange(4), torch.arange(4))
    subject.matcher.train()
    with seeded(4):
        loss = subject.matcher(mentions, entities, gold)
        if subject.matcher.reads_items:
            batch = PairedItems(few.mentions, few.entities, mentions, entities, gold, seed=3)
            loss = loss + subject.matcher.item_loss(batch, slice(0, 4))
    subject.matcher.zero_grad(set_to_none=True)
    loss.backward()
    subject.matcher.eval()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    subject.matcher.zero_grad(set_to_none=True)
