"""How a driver learns what its workers do, and shows it: an actor collects events, a display prints them.

On a terminal there is one live bar per training; without one there is a plain line per epoch, and every 30 s between.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ray_jobs.events import Event

_SHOWN = ("loss", "mrr", "hits@1", "accuracy")
_LOOK_SECONDS = 0.3
_PLAIN_LINE_SECONDS = 30.0
_PLAIN_WIDTH = 110  # of tables that go to a file or a pipe
Result = TypeVar("Result")


def run_watched(
    jobs: Mapping[str, Callable[[], Result]],
    events: Any,
    display: "Display",
    every_look: Callable[[set[str]], None] = lambda running: None,
) -> Iterator[tuple[str, "Future[Result]"]]:
    """Runs blocking calls into Ray in threads of this process; yields each by name when it has ended.

    Meanwhile events go to the display, and `every_look` gets the names of the calls that still run.
    """
    pool = ThreadPoolExecutor(max(len(jobs), 1))
    running = {pool.submit(job): name for name, job in jobs.items()}
    try:
        while running:
            finished, _ = wait(running, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for event in ray.get(events.drain.remote()):
                display.show(event)
            for future in finished:
                yield running.pop(future), future
            every_look(set(running.values()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # interrupted calls end when the connection to Ray closes


class Display:
    """Shows trainings side by side. Use as a context manager around every wait: it starts with no bars."""

    def __init__(self, console: Console | None = None) -> None:
        width = None if sys.stdout.isatty() else _PLAIN_WIDTH
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width)
        self._live = self.console.is_terminal
        columns = (TextColumn("  {task.description:<12}"), BarColumn(30), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._started = time.monotonic()
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._progress.stop()

    @property
    def started(self) -> set[str]:
        """Names of the trainings that have sent an event."""
        return set(self._tasks)

    def say(self, line: str) -> None:
        """Prints one line above the bars."""
        (self._progress.console if self._live else self.console).print(line, markup=False)

    def show(self, event: Event) -> None:
        """Moves a bar, or prints a line at the end of an epoch and where none was printed for 30 s."""
        if event.note:
            self.say(f"  {event.name}: {event.note}")
            return
        if event.name not in self._tasks:
            self._said[event.name] = time.monotonic()
            self._tasks[event.name] = self._progress.add_task(event.name, total=event.total, text="")
        figures = "  ".join(f"{key} {event.metrics[key]:.3f}" for key in _SHOWN if key in event.metrics)
        changes: dict[str, Any] = {"completed": event.done, "total": event.total}
        if figures:
            changes["text"] = f"epoch {event.epoch + 1}  {figures}"
        self._progress.update(self._tasks[event.name], **changes)
        now = time.monotonic()
        if not self._live and (figures or now - self._said[event.name] >= _PLAIN_LINE_SECONDS):
            self._said[event.name] = now
            where = f"epoch {event.epoch + 1:>3}  {figures}" if figures else f"{event.done} of {event.total}"
            self.say(f"  {event.name:<12} {where}  [{now - self._started:.0f} s]")
