"""The contract of `dsmip.models.base` for re-rankers: a score is of its pair alone; what is learned, and stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.models import systems
from dsmip.runs.load_config import parse_config
from dsmip.runs.weights import load_own_weights, own_weights, save_weights
from dsmip.units.matcher import Reranker
from tests.support.encoders.items import Sample, trimmed
from tests.support.encoders.small_backbones import SMALL_BACKBONES
from tests.support.scoring.contract import reader, sample_of, seeded, shake
from tests.support.scoring.small_systems import form_with

MENTION_P, ENTITY_P = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 4, 1, 1, 2, 0])
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@dataclass(frozen=True)
class Subject:
    reranker: Reranker
    sample: Sample
    read: Callable[[ItemBatch], ItemBatch]
    rebuild: Callable[[], Reranker]

    def score(self, mentions: ItemBatch, entities: ItemBatch, mention_P: Tensor, entity_P: Tensor) -> Tensor:
        return self.reranker.score_pairs(self.read(mentions), self.read(entities), mention_P, entity_P)


def cases() -> Iterator[Any]:
    for name, system in systems().items():
        for kind in SMALL_BACKBONES:
            if (form := form_with(name, kind)) is not None:
                tree = {"model": name, "backbone": {"architecture": "tiny"}, "system": form}
                for part in system.rerankers(parse_config(tree).system):
                    quick = kind == "separate towers"
                    yield pytest.param(
                        (name, form, kind, part), id=f"{name}-{kind}", marks=[] if quick else [pytest.mark.slow]
                    )


@pytest.fixture(scope="module", params=cases())
def subject(request: pytest.FixtureRequest, architecture_of: Callable[[str], str]) -> Subject:
    name, form, kind, part = request.param
    system, architecture = systems()[name], architecture_of(kind)
    config = parse_config({"model": name, "backbone": {"architecture": architecture}, "system": form})

    def build() -> Reranker:
        return system.build_reranker(part, config).eval()

    with seeded(1):
        reranker = build()
        shake(reranker)
    return Subject(reranker, sample_of(kind, architecture), reader(system, part, config), build)


@pytest.fixture(scope="module")
def score_P(subject: Subject) -> Tensor:
    with torch.no_grad():
        return subject.score(subject.sample.mentions, subject.sample.entities, MENTION_P, ENTITY_P)


@torch.no_grad()
def test_scores_are_finite_float32_differ_and_do_not_change(subject: Subject, score_P: Tensor) -> None:
    assert score_P.shape == MENTION_P.shape
    assert score_P.dtype == torch.float32
    assert score_P.isfinite().all()
    assert score_P.std() > 20 * CLOSE["atol"]
    with seeded(99):
        again_P = subject.score(subject.sample.mentions, subject.sample.entities, MENTION_P, ENTITY_P)
    assert torch.equal(again_P, score_P)


@torch.no_grad()
def test_a_score_is_of_its_pair_alone(subject: Subject, score_P: Tensor) -> None:
    """Whatever other pairs there are, their order, and how much padding its items have."""
    sample, first = subject.sample, torch.zeros(1, dtype=torch.int64)
    for place, (mention, entity) in enumerate(zip(MENTION_P.tolist(), ENTITY_P.tolist(), strict=True)):
        pair = sample.mentions.rows(mention, mention + 1), sample.entities.rows(entity, entity + 1)
        alone_P = subject.score(trimmed(pair[0]), trimmed(pair[1]), first, first)
        torch.testing.assert_close(alone_P, score_P[place : place + 1], **CLOSE)
    for mentions, entities in sample.padded():
        found_P = subject.score(mentions, entities, MENTION_P.flip(0), ENTITY_P.flip(0))
        torch.testing.assert_close(found_P.flip(0), score_P, **CLOSE)


@torch.no_grad()
def test_saved_weights_give_the_same_scores(subject: Subject, score_P: Tensor, tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.safetensors", own_weights(subject.reranker))
    with seeded(7):
        again = subject.rebuild()
    items = subject.read(subject.sample.mentions), subject.read(subject.sample.entities)
    assert not torch.equal(again.score_pairs(*items, MENTION_P, ENTITY_P), score_P)
    load_own_weights(again, tmp_path / "weights.safetensors")
    assert torch.equal(again.score_pairs(*items, MENTION_P, ENTITY_P), score_P)


def test_a_loss_is_of_each_mentions_own_entities_and_trains_all(subject: Subject, score_P: Tensor) -> None:
    """The gold is first, a row of -1 is none."""
    items = subject.read(subject.sample.mentions.rows(0, 4)), subject.read(subject.sample.entities)
    entity_MK = torch.tensor([[0, 4], [1, -1], [1, -1], [2, 0]])
    loss = subject.reranker(*items, entity_MK)
    wrong = [score_P[0:2], score_P[4:6]]
    expected = -sum(torch.log_softmax(pair, dim=0)[0] for pair in wrong)  # a gold alone costs nothing
    torch.testing.assert_close(loss, torch.as_tensor(expected), atol=1e-3, rtol=1e-3)
    loss.backward()
    trained = {name: each.grad for name, each in subject.reranker.named_parameters() if each.requires_grad}
    reached = {name: gradient for name, gradient in trained.items() if gradient is not None}
    towers = subject.reranker.tower_tensors()
    assert trained.keys() - reached.keys() <= towers  # a fusion of tokens leaves out what pools them
    assert towers & reached.keys()
    assert all(bool(gradient.isfinite().all()) for gradient in reached.values())
    assert any(bool(gradient.any()) for gradient in reached.values())
    subject.reranker.zero_grad(set_to_none=True)
