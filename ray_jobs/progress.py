"""How a driver learns what its workers do, and shows it: an actor collects events, a display prints them.

On a terminal there is one live bar per training; without one there is a plain line per epoch.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_SHOWN = ("loss", "mrr", "hits@1", "accuracy")


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one training: `done` of `total` steps of all epochs; `metrics` when an epoch has ended."""

    name: str
    done: int
    total: int
    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)


@ray.remote(num_cpus=0)
class EventQueue:
    """Holds events between a worker's push and the driver's next look. Costs no CPU share."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def push(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class Display:
    """Shows trainings side by side. Use as a context manager around the wait."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        columns = (TextColumn("  {task.description:<12}"), BarColumn(30), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._progress.stop()

    @property
    def started(self) -> Sequence[str]:
        """Names of the trainings that have sent an event."""
        return list(self._tasks)

    def say(self, line: str) -> None:
        """Prints one line above the bars."""
        (self._progress.console if self._live else self.console).print(line, markup=False)

    def show(self, event: Event) -> None:
        """Moves a bar, or prints a line at the end of an epoch."""
        if event.name not in self._tasks:
            self._tasks[event.name] = self._progress.add_task(event.name, total=event.total, text="")
        figures = "  ".join(f"{key} {event.metrics[key]:.3f}" for key in _SHOWN if key in event.metrics)
        changes: dict[str, Any] = {"completed": event.done, "total": event.total}
        if figures:
            changes["text"] = f"epoch {event.epoch + 1}  {figures}"
        self._progress.update(self._tasks[event.name], **changes)
        if figures and not self._live:
            seconds = time.monotonic() - self._started
            self.say(f"  {event.name:<12} epoch {event.epoch + 1:>3}  {figures}  [{seconds:.0f} s]")
