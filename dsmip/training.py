"""The one training loop: batches in, a trained `Matcher` out. It talks to the outside only through `Context`.

What one step computes is in `gradients.py`; where batches come from is in `sources.py`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dsmip import distributed
from dsmip.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dsmip.config import TrainConfig
from dsmip.errors import UserError
from dsmip.gradients import BatchLoss, LossNotFinite, Step, batch_backward
from dsmip.models.base import Matcher
from dsmip.optimization import build_optimizer, clip_gradients, learning_rate_factor
from dsmip.streams import draw
from dsmip.watch import StepFigures, timed


class StepSource(Protocol):
    """Batches as a pure function of (epoch, step), the same number on every worker."""

    def num_steps(self) -> int: ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """The steps of an epoch from `start` on."""


class Context(Protocol):
    """The outside world of a training: where it runs and whom it tells."""

    device: torch.device

    def alive(self) -> None:
        """Called from time to time in long work between steps."""

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        """Called after each step."""

    def asked_to_leave(self) -> bool:
        """Whether a worker's machine is about to go. Called after each step; all workers get the same answer."""

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        """Called within an epoch, after `step` steps of it; `checkpoint` as in `epoch_done`."""

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Called after each epoch by every worker; `checkpoint` is a finished folder on rank 0, None elsewhere."""

    def restore(self) -> Path | None:
        """Folder of the checkpoint to go on from, or None."""

    def checkpoint_folder(self, epoch: int, step: int) -> Path:
        """A fresh local folder for a checkpoint from which a training goes on at that step."""


class Left(Exception):
    """The training was asked to leave its machine, and has saved where it was."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Metrics of every epoch, and the best epoch by validation MRR (its weights are in the matcher)."""

    history: list[dict[str, float]]
    best_epoch: int

    @property
    def best(self) -> dict[str, float]:
        return self.history[self.best_epoch]


def train(
    matcher: Matcher,
    source: StepSource,
    config: TrainConfig,
    context: Context,
    validate: Callable[[Matcher], Mapping[str, float]],
    *,
    seed: int,
    stop_epoch: int | None = None,
    checkpoint_steps: int | None = None,
) -> TrainResult:
    """Trains until `config.epochs` or until validation MRR has not risen for `config.patience` epochs.

    Resumes from `context.restore()`. On return the matcher holds the weights of the best epoch. `validate` returns
    metrics with the key `mrr`; with several workers it is called on each, and must return the same on each.
    stop_epoch: pause there (a rung of successive halving); the schedule still spans `config.epochs`.
    checkpoint_steps: save after so many steps, besides after each epoch.

    Raises UserError when the training diverges, and Left.
    """
    run = _Run(matcher, source, config, context, seed)
    state = run.resume()
    last = config.epochs if stop_epoch is None else min(stop_epoch, config.epochs)
    while state.epoch < last and not _patience_lost(state.history, config.patience):
        run.epoch(state, checkpoint_steps)
        metrics = {"epoch": float(state.epoch), "loss": state.loss_sum / max(state.num_mentions, 1)}
        state.begin(state.epoch + 1)
        if state.epoch % config.validate_every == 0 or state.epoch == last:
            metrics |= validate(matcher)
        state.history.append(metrics)
        if _best_epoch(state.history) == len(state.history) - 1:
            state.best = {name: tensor.detach().clone() for name, tensor in trained_state(matcher).items()}
        context.epoch_done(metrics, run.save(state))
    matcher.load_state_dict(state.best, strict=False)
    return TrainResult(state.history, _best_epoch(state.history))


@dataclass
class _State:
    """How far a training is: what `Checkpoint` says of its position, history and best weights."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    num_mentions: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, epoch: int) -> None:
        self.epoch, self.step, self.loss_sum, self.num_mentions = epoch, 0, 0.0, 0


def trained_state(matcher: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: parameters with gradients, and all buffers but a backbone's."""
    trained = {name: parameter.data for name, parameter in matcher.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in matcher.named_buffers() if ".backbone." not in f".{name}"}


def _best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch with the highest validation MRR, the last one of equals; epochs without validation do not count."""
    return max(range(len(history)), key=lambda epoch: (history[epoch].get("mrr", -1.0), epoch))


def _patience_lost(history: list[dict[str, float]], patience: int | None) -> bool:
    if patience is None or not history or "mrr" not in history[-1]:
        return False  # only a validation can tell
    risen = max(range(len(history)), key=lambda epoch: history[epoch].get("mrr", -1.0))  # the first of equals
    return len(history) - 1 - risen >= patience


class _Run:
    """Optimizer, schedule and scaler of one training, and the epoch over them."""

    def __init__(self, matcher: Matcher, source: StepSource, config: TrainConfig, context: Context, seed: int) -> None:
        self.matcher, self.source, self.config, self.context, self.seed = matcher, source, config, context, seed
        matcher.to(context.device)
        self.optimizer = build_optimizer(matcher, config)
        total = config.epochs * source.num_steps()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total, config)
        )
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.precision == "fp16")

    def resume(self) -> _State:
        folder = self.context.restore()
        if folder is None:
            return _State()
        stored = load_checkpoint(folder, self.context.device)
        self.matcher.load_state_dict(stored.weights, strict=False)
        self.optimizer.load_state_dict(stored.optimizer)
        self.schedule.load_state_dict(stored.schedule)
        self.scaler.load_state_dict(stored.scaler)
        return _State(stored.epoch, stored.step, stored.loss_sum, stored.num_mentions, stored.history, stored.best)

    def save(self, state: _State) -> Path | None:
        """A finished checkpoint on the first worker, None on the others."""
        if distributed.rank() > 0:
            return None
        folder = self.context.checkpoint_folder(state.epoch, state.step)
        checkpoint = Checkpoint(
            epoch=state.epoch,
            step=state.step,
            loss_sum=state.loss_sum,
            num_mentions=state.num_mentions,
            history=state.history,
            weights=trained_state(self.matcher),
            best=state.best,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
        )
        save_checkpoint(folder, checkpoint)
        return folder

    def epoch(self, state: _State, checkpoint_steps: int | None) -> None:
        """What is left of an epoch; adds up its loss in `state`."""
        self.matcher.train()
        num_steps = self.source.num_steps()
        for step, wait_seconds in timed(self.source.steps(state.epoch, state.step)):
            started = time.perf_counter()
            # dropout and Gumbel noise are a function of the position, so that a resumed run draws the same
            torch.manual_seed(draw(2**63, "noise", self.seed, state.epoch, state.step, distributed.rank()))
            learning_rate = float(self.schedule.get_last_lr()[0])
            loss, gradient_norm = self.step(step, state)
            state.step += 1
            state.loss_sum += loss.total
            state.num_mentions += loss.num_mentions
            seconds = wait_seconds + time.perf_counter() - started
            figures = StepFigures(loss.mean, gradient_norm, learning_rate, loss.num_mentions, seconds, wait_seconds)
            self.context.step_done(state.epoch, state.step - 1, num_steps, figures)
            leave = self.context.asked_to_leave()
            due = checkpoint_steps is not None and state.step % checkpoint_steps == 0 and state.step < num_steps
            if leave or due:
                self.context.step_saved(state.epoch, state.step, self.save(state))
            if leave:
                raise Left

    def step(self, step: Step, state: _State) -> tuple[BatchLoss, Tensor]:
        """One update; returns the batch's loss over all workers and the gradient's norm. UserError when it diverges."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = batch_backward(self.matcher, step, self.config, self.context.device, self.scaler.scale)
        except LossNotFinite as error:
            raise _diverged(f"the loss is {error}", state) from error
        distributed.sum_gradients(self.matcher.parameters())
        self.scaler.unscale_(self.optimizer)
        gradient_norm = clip_gradients(self.matcher, self.config.clip_norm)
        if not (self.scaler.is_enabled() or bool(torch.isfinite(gradient_norm))):  # the scaler passes such steps over
            raise _diverged(f"the gradient's norm is {float(gradient_norm)}", state)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss, gradient_norm


def _diverged(what: str, state: _State) -> UserError:
    return UserError(
        f"{what} in epoch {state.epoch + 1}, step {state.step + 1}: the training has diverged and stops before its "
        "weights are lost; train anew with a lower learning_rate, with warmup_steps or with clip_norm"
    )
