"""The one training loop: batches in, a trained `Matcher` out. It talks to the outside only through `Context`.

What one step computes is in `gradients.py`; where batches come from is in `sources.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dsmip import distributed
from dsmip.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dsmip.config import TrainConfig
from dsmip.gradients import Step, batch_backward
from dsmip.models.base import Matcher
from dsmip.watch import StepFigures, timed


class StepSource(Protocol):
    """Batches as a pure function of (epoch, step), the same number on every worker."""

    def num_steps(self) -> int: ...

    def steps(self, epoch: int) -> Iterator[Step]: ...


class Context(Protocol):
    """The outside world of a training: where it runs and whom it tells."""

    device: torch.device

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        """Called after each step."""

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Called after each epoch by every worker; `checkpoint` is a finished folder on rank 0, None elsewhere."""

    def restore(self) -> Path | None:
        """Folder of the checkpoint to go on from, or None."""

    def checkpoint_folder(self, epoch: int) -> Path:
        """A fresh local folder to write a checkpoint into."""


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
) -> TrainResult:
    """Trains until `config.epochs` or until validation MRR has not risen for `config.patience` epochs.

    Resumes from `context.restore()`. On return the matcher holds the weights of the best epoch. `validate` returns
    metrics with the key `mrr`; with several workers it is called on each, and must return the same on each.
    stop_epoch: pause there (a rung of successive halving); the schedule still spans `config.epochs`.
    """
    run = _Run(matcher, source, config, context)
    state = run.resume()
    last = config.epochs if stop_epoch is None else min(stop_epoch, config.epochs)
    while state.epoch < last and not _patience_lost(state.history, config.patience):
        epoch_loss = run.epoch(state.epoch, seed)
        metrics = {"epoch": float(state.epoch), "loss": epoch_loss}
        state.epoch += 1
        if state.epoch % config.validate_every == 0 or state.epoch == last:
            metrics |= validate(matcher)
        state.history.append(metrics)
        if _best_epoch(state.history) == len(state.history) - 1:
            state.best = {name: tensor.detach().clone() for name, tensor in trained_state(matcher).items()}
        folder = run.save(state) if distributed.rank() == 0 else None
        context.epoch_done(metrics, folder)
    matcher.load_state_dict(state.best, strict=False)
    return TrainResult(state.history, _best_epoch(state.history))


@dataclass
class _State:
    epoch: int
    history: list[dict[str, float]]
    best: dict[str, Tensor]


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

    def __init__(self, matcher: Matcher, source: StepSource, config: TrainConfig, context: Context) -> None:
        self.matcher, self.source, self.config, self.context = matcher, source, config, context
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
            return _State(0, [], {})
        stored = load_checkpoint(folder, self.context.device)
        self.matcher.load_state_dict(stored.weights, strict=False)
        self.optimizer.load_state_dict(stored.optimizer)
        self.schedule.load_state_dict(stored.schedule)
        self.scaler.load_state_dict(stored.scaler)
        return _State(stored.epoch, stored.history, stored.best)

    def save(self, state: _State) -> Path:
        folder = self.context.checkpoint_folder(state.epoch - 1)
        checkpoint = Checkpoint(
            epoch=state.epoch,
            history=state.history,
            weights=trained_state(self.matcher),
            best=state.best,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
        )
        save_checkpoint(folder, checkpoint)
        return folder

    def epoch(self, epoch: int, seed: int) -> float:
        """One pass over the data; returns the mean loss per mention over all workers."""
        self.matcher.train()
        loss_and_count = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        num_steps = self.source.num_steps()
        for number, (step, wait_seconds) in enumerate(timed(self.source.steps(epoch))):
            started = time.perf_counter()
            # dropout and Gumbel noise are a function of the position, so that a resumed run draws the same
            torch.manual_seed(hash((seed, epoch, number, distributed.rank())) % 2**63)
            learning_rate = float(self.schedule.get_last_lr()[0])
            loss, gradient_norm, count = self.step(step)
            loss_and_count += torch.tensor([loss * count, count], device=self.context.device)
            seconds = wait_seconds + time.perf_counter() - started
            num_samples = count * distributed.world_size()  # shares differ by at most one
            figures = StepFigures(loss, gradient_norm, learning_rate, num_samples, seconds, wait_seconds)
            self.context.step_done(epoch, number, num_steps, figures)
        total, count = distributed.sum_over_workers(loss_and_count).tolist()
        return float(total / max(count, 1.0))

    def step(self, step: Step) -> tuple[float, Tensor, int]:
        """One update; returns this worker's mean loss, the gradient's norm and this worker's number of mentions."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = batch_backward(self.matcher, step, self.config, self.context.device, self.scaler.scale)
        distributed.sum_gradients(self.matcher.parameters())
        self.scaler.unscale_(self.optimizer)
        gradient_norm = clip_gradients(self.matcher, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss, gradient_norm, len(step.gold_row_M)


def clip_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Scales all gradients down to `clip_norm` (None: leaves them) and returns their norm before, 0-dimensional."""
    if clip_norm is not None:
        return nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def build_optimizer(matcher: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Adam when `weight_decay` is 0); tower parameters may have a learning rate of their own.

    Weight decay spares vectors (norms and biases), as is usual.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in matcher.named_parameters():
        if parameter.requires_grad:
            in_tower = ".backbone." in f".{name}"
            rate = (config.tower_learning_rate or config.learning_rate) if in_tower else config.learning_rate
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()])


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step: linear warm-up, then constant, or a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
