"""The steps of every training: saved and resumed at any of them, left on notice, ended when the training diverges.

What a step computes is its `Objective`'s; the loop talks to the outside only through `Context`.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dsmip import distributed
from dsmip.data.sampler import draw
from dsmip.errors import UserError
from dsmip.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dsmip.training.monitor import StepFigures, timed
from dsmip.training.optimizer import clip_gradients

Scale = Callable[[Tensor], Tensor]
_LEAST_SCALE = 1.0  # of fp16 losses: halved at each overflow from 65,536 on, so a sound training never comes here


class StepSource(Protocol):
    """Batches as a pure function of (epoch, step), the same number on every worker."""

    def num_steps(self) -> int: ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """What the objective takes: the steps of an epoch from `start` on."""


class Context(Protocol):
    """The outside world of a training: where it runs and whom it tells."""

    device: torch.device

    def alive(self) -> None:
        """Called from time to time in long work between steps."""

    def warn(self, line: str) -> None:
        """Called with what whoever started the training should know."""

    def features_done(self, done: int, total: int) -> None:
        """Called while features of frozen towers are computed before the first step, with the items that are done."""

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
class BatchSums:
    """Sums over the `count` samples of a batch and all workers, equal on each: of the `loss`, and other figures."""

    sums: Mapping[str, float]
    count: int


class Objective(ABC):
    """What is trained, and the gradient of a batch."""

    module: nn.Module

    @abstractmethod
    def backward(self, batch: Any, device: torch.device, scale: Scale) -> BatchSums:
        """Accumulates this worker's share of the gradient of the batch's mean loss, scaled by `scale`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that training changes."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts such tensors back."""

    @abstractmethod
    def after_step(self) -> None:
        """Called after each update."""


@dataclass
class LoopState:
    """How far a training is: what `Checkpoint` says of its position, history and best weights."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    hard_row_NK: Tensor | None = None

    def add(self, batch: BatchSums) -> None:
        """Counts a step."""
        self.step, self.count = self.step + 1, self.count + batch.count
        for name, value in batch.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def end_epoch(self) -> dict[str, float]:
        """The epoch's number and means per sample; goes on to the next one."""
        means = {"epoch": float(self.epoch)} | {name: value / max(self.count, 1) for name, value in self.sums.items()}
        self.epoch, self.step, self.sums, self.count = self.epoch + 1, 0, {}, 0
        return means


class Loop:
    """Optimizer, schedule and scaler of one training, and the epoch over them.

    Attributes:
        rate_factor: Of the learning rate, by step.
        checkpoint_steps: Save after so many steps, besides after each epoch.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        rate_factor: Callable[[int], float],
        context: Context,
        *,
        seed: int,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        clip_norm: float | None = None,
        checkpoint_steps: int | None = None,
    ) -> None:
        self.objective, self.optimizer, self.context = objective, optimizer, context
        self.seed, self.clip_norm, self.checkpoint_steps = seed, clip_norm, checkpoint_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=precision == "fp16")

    def resume(self) -> LoopState:
        """Goes back to the checkpoint of `Context.restore`, if there is one."""
        folder = self.context.restore()
        if folder is None:
            return LoopState()
        stored = load_checkpoint(folder, self.context.device)
        self.objective.load_state(stored.weights)
        self.optimizer.load_state_dict(stored.optimizer)
        self.schedule.load_state_dict(stored.schedule)
        self.scaler.load_state_dict(stored.scaler)
        position = stored.epoch, stored.step, stored.sums, stored.count, stored.history
        return LoopState(*position, stored.best, stored.hard_row_NK)

    def save(self, state: LoopState) -> Path | None:
        """A finished checkpoint on the first worker, None on the others."""
        if distributed.rank() > 0:
            return None
        folder = self.context.checkpoint_folder(state.epoch, state.step)
        checkpoint = Checkpoint(
            epoch=state.epoch,
            step=state.step,
            sums=state.sums,
            count=state.count,
            history=state.history,
            weights=self.objective.state(),
            best=state.best,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
            hard_row_NK=state.hard_row_NK,
        )
        save_checkpoint(folder, checkpoint)
        return folder

    def epoch(self, source: StepSource, state: LoopState) -> None:
        """What is left of an epoch.

        Raises:
            Left: This worker is to leave; all is saved.
            UserError: The training diverges.
        """
        self.objective.module.train()
        num_steps = source.num_steps()
        for batch, wait_seconds in timed(source.steps(state.epoch, state.step)):
            started = time.perf_counter()
            # dropout and Gumbel noise are a function of the position, so that a resumed run draws the same
            torch.manual_seed(draw(2**63, "noise", self.seed, state.epoch, state.step, distributed.rank()))
            learning_rate = float(self.schedule.get_last_lr()[0])
            sums, gradient_norm = self._update(batch, state)
            state.add(sums)
            seconds = wait_seconds + time.perf_counter() - started
            loss = sums.sums["loss"] / max(sums.count, 1)
            figures = StepFigures(loss, gradient_norm, learning_rate, sums.count, seconds, wait_seconds)
            self.context.step_done(state.epoch, state.step - 1, num_steps, figures)
            self._save_within_epoch(state, num_steps)

    def _save_within_epoch(self, state: LoopState, num_steps: int) -> None:
        leave = self.context.asked_to_leave()
        every = self.checkpoint_steps
        if leave or (every is not None and state.step % every == 0 and state.step < num_steps):
            self.context.step_saved(state.epoch, state.step, self.save(state))
        if leave:
            raise Left

    def _update(self, batch: Any, state: LoopState) -> tuple[BatchSums, Tensor]:
        """One step.

        Returns:
            The batch's sums, and the gradient's norm.

        Raises:
            UserError: On all workers: the training diverges.
        """
        module = self.objective.module
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.objective.backward(batch, self.context.device, self.scaler.scale)
        if not math.isfinite(sums.sums["loss"]):
            raise _diverged(f"the loss is {sums.sums['loss']}", state)
        distributed.sum_gradients(module.parameters())
        self.scaler.unscale_(self.optimizer)
        gradient_norm = clip_gradients(module, self.clip_norm)
        if not (self.scaler.is_enabled() or bool(torch.isfinite(gradient_norm))):  # the scaler passes such steps over
            raise _diverged(f"the gradient's norm is {float(gradient_norm)}", state)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            raise _diverged("no step has had a finite gradient for long", state)
        self.schedule.step()
        self.objective.after_step()
        return sums, gradient_norm


def _diverged(what: str, state: LoopState) -> UserError:
    return UserError(
        f"{what} in epoch {state.epoch + 1}, step {state.step + 1}: the training has diverged and stops before "
        "its weights are lost; train anew with a lower learning_rate, with warmup_steps or with clip_norm"
    )
