"""The training of a part: batches in, the best epoch's weights out.

What one step computes is in `gradients.py`, the steps themselves in `loop.py`, where batches come from in `batches.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dsmip.config import TrainConfig
from dsmip.training.gradients import batch_backward
from dsmip.training.loop import BatchSums, Context, Loop, Objective, Scale, StepSource
from dsmip.training.optimizer import build_optimizer, learning_rate_factor
from dsmip.units.matcher import Matcher, Part

Trained = TypeVar("Trained", bound=Part)


class MinedSource(StepSource, Protocol):
    """Batches that take hard negatives of their mentions.

    Attributes:
        hard_row_NK: kb rows int64 [N, K] of all its mentions, -1 where there is none; None: not known yet.
    """

    hard_row_NK: Tensor | None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Metrics of every epoch, and the best epoch by validation MRR (its weights are in the matcher)."""

    history: list[dict[str, float]]
    best_epoch: int

    @property
    def best(self) -> dict[str, float]:
        return self.history[self.best_epoch]


def train(
    part: Trained,
    source: MinedSource,
    config: TrainConfig,
    context: Context,
    validate: Callable[[Trained], Mapping[str, float]],
    mine: Callable[[Trained], Tensor] | None = None,
    validate_between: Callable[[Trained], Mapping[str, float]] | None = None,
    *,
    objective: Objective | None = None,
    seed: int,
    stop_epoch: int | None = None,
    checkpoint_steps: int | None = None,
    best_by: str = "mrr",
) -> TrainResult:
    """Trains until `config.epochs` or until validation MRR has not risen for `config.patience` epochs.

    Resumes from `context.restore()`. On return the part holds the weights of the best epoch. `validate` returns
    metrics with the key `best_by`; with several workers it is called on each, and must return the same on each.

    Args:
        objective: What is minimised; None: the part is a matcher, and its own loss is.
        mine: Finds hard negatives (kb rows int64 [N, k] of the source's mentions) after every `hard_negatives_every`
            epochs; until the first time there are none.
        validate_between: As `validate`, of epochs that are not validated otherwise; without the key `best_by` they
            are never the best.
        stop_epoch: Pause there (a rung of successive halving); the schedule still spans `config.epochs`.
        checkpoint_steps: Save after so many steps, besides after each epoch.
        best_by: The validation's metric that tells the best epoch; higher is better.

    Raises:
        UserError: The training diverges.
        Left: This worker was told to leave, and has saved.
    """
    part.to(context.device)
    if objective is None:
        assert isinstance(part, Matcher)
        objective = MatcherObjective(part, config)
    total_steps = config.epochs * source.num_steps()
    loop = Loop(
        objective,
        build_optimizer(part, config, part.tower_tensors()),
        lambda step: learning_rate_factor(step, total_steps, config),
        context,
        seed=seed,
        precision=config.precision,
        clip_norm=config.clip_norm,
        checkpoint_steps=checkpoint_steps,
    )
    state = loop.resume()
    last = config.epochs if stop_epoch is None else min(stop_epoch, config.epochs)
    while state.epoch < last and not _patience_lost(state.history, config.patience, best_by):
        if mine is not None:
            source.hard_row_NK = state.hard_row_NK
        loop.epoch(source, state)
        metrics = state.end_epoch()
        if state.epoch % config.validate_every == 0 or state.epoch == last:
            metrics |= validate(part)
        elif validate_between is not None:
            metrics |= validate_between(part)
        if mine is not None and state.epoch % config.hard_negatives_every == 0 and state.epoch < config.epochs:
            state.hard_row_NK = mine(part)
        state.history.append(metrics)
        if _best_epoch(state.history, best_by) == len(state.history) - 1:
            state.best = {name: tensor.detach().clone() for name, tensor in trained_state(part).items()}
        context.epoch_done(metrics, loop.save(state))
    part.load_state_dict(state.best, strict=False)
    return TrainResult(state.history, _best_epoch(state.history, best_by))


class PartObjective(Objective):
    """What a part is trained for: its state is what training changes of it."""

    module: Part

    def state(self) -> dict[str, Tensor]:
        return trained_state(self.module)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(state, strict=False)

    def after_step(self) -> None:
        """No parameter is kept in bounds."""


class MatcherObjective(PartObjective):
    """A matcher's own loss over a batch."""

    def __init__(self, matcher: Matcher, config: TrainConfig) -> None:
        self.module: Matcher = matcher
        self._config = config

    def backward(self, batch: Any, device: torch.device, scale: Scale) -> BatchSums:
        loss = batch_backward(self.module, batch, self._config, device, scale)
        return BatchSums({"loss": loss.total}, loss.num_mentions)


def trained_state(part: Part) -> dict[str, Tensor]:
    """The tensors that training changes: parameters with gradients, and all buffers but the towers'."""
    towers = part.tower_tensors()
    trained = {name: parameter.data for name, parameter in part.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in part.named_buffers() if name not in towers}


def _best_epoch(history: list[dict[str, float]], best_by: str) -> int:
    """The epoch of the highest validation metric, the last one of equals; epochs without validation do not count."""
    return max(range(len(history)), key=lambda epoch: (history[epoch].get(best_by, -math.inf), epoch))


def _patience_lost(history: list[dict[str, float]], patience: int | None, best_by: str) -> bool:
    if patience is None or not history or best_by not in history[-1]:
        return False  # only a validation can tell
    risen = max(range(len(history)), key=lambda epoch: history[epoch].get(best_by, -math.inf))  # the first of equals
    return len(history) - 1 - risen >= patience
