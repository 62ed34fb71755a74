"""Progress, lines and tables of a command: bars on a terminal, plain lines elsewhere. Knows no Ray."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from dsmip.messages import shown
from ray_jobs.terminal.lines import progress_console, result_console

_FIGURES = ("loss", "mrr", "hits@1", "subset_mrr", "accuracy")  # of an epoch, beside its bar
_PLAIN_LINE_SECONDS = 30.0


class Display:
    """A `dsmip.progress.Progress` that shows works side by side, and prints lines above them.

    On a terminal each work has a bar. Elsewhere there is a line at an epoch's or a work's end, and one with rate and
    remaining time where none was printed for 30 s. Use as a context manager around every wait: it starts with no bars.
    """

    def __init__(self, console: Console | None = None, *, transient: bool = False) -> None:
        """
        Args:
            console: where everything is printed; stdout by default.
            transient: progress goes to stderr and its bars vanish at the end, for commands whose output is a result.
        """
        self.console = console or result_console()
        bars = progress_console() if transient else self.console
        self._live, self._transient = bars.is_terminal, transient
        columns = (TextColumn("  {task.description:<18}", markup=False), BarColumn(30), MofNCompleteColumn(), _Rate())
        self._bars = Bars(
            *columns,
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=bars,
            transient=transient,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._first: dict[str, tuple[int, int, float]] = {}
        self._ended: set[str] = set()
        self._started = time.monotonic()
        self.interrupted: Callable[[], str] = lambda: "interrupted; run the command again to go on"
        """What is said when a user ends the command while this is entered."""

    def __enter__(self) -> Self:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._first.clear()
        self._ended.clear()
        self._started = time.monotonic()
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not self._transient:
            self.say(self.interrupted())

    @property
    def started(self) -> set[str]:
        """Names of the works that have shown progress since the display was entered."""
        return set(self._tasks)

    def say(self, line: str) -> None:
        """Prints one line above the bars."""
        self.console.print(shown(line), markup=False, soft_wrap=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done; `total` 0: not known."""
        self._move(what, done, total)
        if self._live or what in self._ended:
            return
        if total and done >= total:
            self._ended.add(what)
            self._line(what, str(total))
        else:
            self._line_in_time(what, done, total)

    def show_steps(self, name: str, done: int, total: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Shows a training that has made `done` of `total` steps; `metrics`: of `epoch`, which has just ended."""
        figures = "  ".join(f"{key} {metrics[key]:.3f}" for key in _FIGURES if key in metrics)
        if figures:
            self._move(name, done, total, figures=f"epoch {epoch + 1}  {figures}")
        else:
            self._move(name, done, total)
        if self._live:
            return
        if figures:
            self._line(name, f"epoch {epoch + 1:>3}  {figures}")
        else:
            self._line_in_time(name, done, total)

    def _move(self, name: str, done: int, total: int, **fields: Any) -> None:
        if name not in self._tasks:
            self._printed[name] = time.monotonic()
            self._tasks[name] = self._bars.add_task(shown(name), total=total or None, figures="")
        if self._first.get(name, (0, -1, 0.0))[1] != total:  # a worker that starts does not know it yet
            self._first[name] = done, total, time.monotonic()
        self._bars.update(self._tasks[name], completed=done, total=total or None, **fields)

    def _line_in_time(self, name: str, done: int, total: int) -> None:
        if time.monotonic() - self._printed[name] >= _PLAIN_LINE_SECONDS:
            self._line(name, f"{done} of {total}{self._pace(name, done, total)}" if total else f"{done}")

    def _pace(self, name: str, done: int, total: int) -> str:
        """Its rate since it was first shown, and the time that is left at that rate."""
        first, _, started = self._first[name]
        rate = (done - first) / max(time.monotonic() - started, 1e-9)
        return f"  {rate:.3g}/s, {_duration((total - done) / rate)} left" if rate > 0 else ""

    def _line(self, name: str, text: str) -> None:
        self._printed[name] = time.monotonic()
        line = f"  {name:<12} {text}  [{self._printed[name] - self._started:.0f} s]"
        if self._transient:
            self._bars.console.print(shown(line), markup=False, soft_wrap=True)
        else:
            self.say(line)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Rate(ProgressColumn):
    """Items or steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")
