"""A toy training: a matcher of one projection over cached vectors, its source, a scripted validation, kills."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsmip.config import TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.training.batches import CachedSource
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.trainer import TrainResult, train, trained_state
from dsmip.units.matcher import BatchGold, Matcher, Scores

CPU = torch.device("cpu")
WIDTH = 4


class ToyMatcher(Matcher):
    """A trained projection with dropout over cached vectors, and a frozen one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.projection = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.frozen = nn.Parameter(torch.randn(WIDTH, generator=generator), requires_grad=False)

    def encode_mentions(self, batch: ItemBatch) -> Table:
        raise NotImplementedError

    def encode_entities(self, batch: ItemBatch) -> Table:
        raise NotImplementedError

    def prepare_mentions(self, features: Table) -> Table:
        vectors = features.dense("vector") @ self.projection + self.bias
        return Table({"vector": functional.dropout(vectors, 0.3, training=self.training)})

    def prepare_entities(self, features: Table) -> Table:
        return Table({"vector": features.dense("vector") * self.frozen})

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        return Scores(mentions.dense("vector") @ entities.dense("vector").T)

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        return functional.cross_entropy(self.score(mentions, entities).total_ME, gold.column_M, reduction="sum")

    def encoder_trains(self) -> bool:
        return False


class RecordingContext(LocalContext):
    """Notes what it is told; `last` stops the training after that epoch as a killed process would.

    killed_at: a (epoch, step) after which the process is killed. leave_at: one after which it is asked to leave.
    """

    def __init__(
        self,
        folder: Path,
        last: int | None = None,
        killed_at: tuple[int, int] | None = None,
        leave_at: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(folder)
        self.last, self.killed_at, self.leave_at = last, killed_at, leave_at
        self.steps, self.epochs, self.position = 0, 0, (0, 0)

    def asked_to_leave(self) -> bool:
        return self.position == self.leave_at

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        assert 0 <= step < num_steps
        assert math.isfinite(figures.loss)
        assert 0 <= figures.wait_seconds <= figures.seconds
        self.steps, self.position = self.steps + 1, (epoch, step)
        if self.position == self.killed_at:
            raise KeyboardInterrupt

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        super().epoch_done(metrics, checkpoint)
        self.epochs += 1
        if self.last is not None and metrics["epoch"] == self.last:
            raise KeyboardInterrupt


def source(config: TrainConfig) -> CachedSource:
    generator = torch.Generator().manual_seed(5)
    mentions, kb = torch.randn(23, WIDTH, generator=generator), torch.randn(9, WIDTH, generator=generator)
    gold = torch.randint(9, (23,), generator=generator)
    return CachedSource(Table({"vector": mentions}), Table({"vector": kb}), gold, config, seed=1)


Validate = Callable[[Matcher], Mapping[str, float]]


def scripted(scores: list[float], seen: list[dict[str, Tensor]] | None = None) -> Validate:
    """A validation that returns these MRRs one after the other and keeps the weights it saw."""
    values = iter(scores)

    def validate(matcher: Matcher) -> Mapping[str, float]:
        if seen is not None:
            seen.append({name: tensor.clone() for name, tensor in trained_state(matcher).items()})
        return {"mrr": next(values)}

    return validate


def run(
    config: TrainConfig, context: LocalContext, scores: list[float], **options: Any
) -> tuple[ToyMatcher, TrainResult]:
    matcher = ToyMatcher()
    return matcher, train(matcher, source(config), config, context, scripted(scores), seed=3, **options)


def assert_equal_weights(matcher: nn.Module, expected: Mapping[str, Tensor]) -> None:
    found = matcher.state_dict()
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 6,
    "learning_rate": 0.05,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup_steps": 3,
    "clip_norm": 0.5,
    "extra_negatives": 2,
}
RISING = [0.1, 0.2, 0.3, 0.4]
