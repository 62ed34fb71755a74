"""Watching a training: figures of steps and epochs go to writers (TensorBoard, MLflow, W&B, Ray's metrics, a file).

Names are `step/<figure>` and `epoch/<metric>`, in characters that every tool takes (hits@1 is hits_at_1).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Outcome = Literal["finished", "failed", "left"]
"""left: its machine goes; it is to go on on another one."""
_WRITE_SECONDS = 2.0  # a tool gains nothing from more, and a step of stage two takes milliseconds
_ALIVE_SECONDS = 60.0  # a fifth of what `dsmip status` waits before it takes a training for interrupted


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One step on one worker.

    Attributes:
        gradient_norm: Before clipping, 0-dimensional and still on the device.
        num_samples: Of all workers.
        seconds: Of the whole step.
        wait_seconds: Of them, the wait for the batch.
    """

    loss: float
    gradient_norm: Tensor
    learning_rate: float
    num_samples: int
    seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Position:
    """Where a training is: `step` of `num_steps` steps of the epoch are done; epochs count from 0."""

    epoch: int
    step: int
    num_steps: int

    @property
    def total_step(self) -> int:
        """Steps done since the training began."""
        return self.epoch * self.num_steps + self.step


class Writer(Protocol):
    """A destination of figures. A tool is not opened before the first `write`."""

    def alive(self) -> None:
        """Called when the training starts, and about once a minute in long work between its steps."""
        return  # most need none

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        """Adds figures by name."""

    def close(self, outcome: Outcome) -> None:
        """Called once, after the last figures."""


def timed(items: Iterable[Item]) -> Iterator[tuple[Item, float]]:
    """Each item with the seconds that were spent waiting for it."""
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - started


class Watch:
    """Hands figures to writers: means over the steps of the last two seconds, and every epoch's metrics.

    A writer that fails is given up with one warning: a training of days must not end because a server is away.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        device: torch.device,
        warn: Callable[[str], None],
        write_seconds: float = _WRITE_SECONDS,
        alive_seconds: float = _ALIVE_SECONDS,
    ) -> None:
        self._writers, self._device, self._warn = list(writers), device, warn
        self._write_seconds, self._alive_seconds = write_seconds, alive_seconds
        self._steps: list[StepFigures] = []
        self._position = Position(0, 0, 1)
        self._last = time.monotonic()
        self._last_alive = -math.inf

    def alive(self) -> None:
        """As `Context.alive`; to be called at the start, too."""
        now = time.monotonic()
        if now - self._last_alive >= self._alive_seconds:
            self._each(lambda writer: writer.alive())
            self._last_alive = now

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        """As `Context.step_done`."""
        self._position = Position(epoch, step + 1, num_steps)
        self._steps.append(figures)
        if time.monotonic() - self._last >= self._write_seconds:
            self._write_steps()

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        """As `Context.epoch_done`: `metrics` has the key `epoch`."""
        self._write_steps()
        named = {f"epoch/{name.replace('@', '_at_')}": value for name, value in metrics.items() if name != "epoch"}
        num_steps = self._position.num_steps
        self._write(Position(int(metrics["epoch"]), num_steps, num_steps), named)

    def close(self, outcome: Outcome) -> None:
        """Writes what is left and closes all writers."""
        try:
            self._write_steps()
        except Exception as error:  # nothing can be read from a device that has failed
            self._warn(f"warning: figures of the last steps are lost: {type(error).__name__}: {error}")
        self._each(lambda writer: writer.close(outcome))

    def _write_steps(self) -> None:
        if self._steps:
            figures = step_means(self._steps)
            if self._device.type == "cuda":
                figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            self._steps.clear()
            self._write(self._position, {f"step/{name}": value for name, value in figures.items()})
        self._last = time.monotonic()

    def _write(self, position: Position, figures: Mapping[str, float]) -> None:
        self._each(lambda writer: writer.write(position, figures))

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:
                self._writers.remove(writer)
                self._warn(f"warning: {type(writer).__name__} failed and is given up: {type(error).__name__}: {error}")


def step_means(steps: Sequence[StepFigures]) -> dict[str, float]:
    """Means over steps; rates are of the whole time. data_wait_share: of the time, that spent waiting for batches."""
    count, seconds = len(steps), max(sum(step.seconds for step in steps), 1e-9)
    return {
        "loss": sum(step.loss for step in steps) / count,
        "gradient_norm": float(torch.stack([step.gradient_norm.detach() for step in steps]).mean()),
        "learning_rate": steps[-1].learning_rate,
        "samples_per_second": sum(step.num_samples for step in steps) / seconds,
        "data_wait_share": sum(step.wait_seconds for step in steps) / seconds,
    }
