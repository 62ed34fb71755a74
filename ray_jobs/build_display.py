"""Shows how far a build is: a bar per stage with rate and remaining time, or plain lines without a terminal."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ray_jobs.lines import ProgressLines


class BuildDisplay:
    """Use as a context manager; `show` is what `data_prep.build.build.prepare` calls."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        columns = (TextColumn("  {task.description:<18}"), BarColumn(30), MofNCompleteColumn(), _Rate())
        self._progress = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=self._console)
        self._stages: dict[str, TaskID] = {}
        self._last, self._lines = "", ProgressLines()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        if kind is KeyboardInterrupt:
            self._console.print("interrupted; run the command again to go on", markup=False)

    def show(self, stage: str, done: int, total: int) -> None:
        """`total` 0: not known."""
        if not self._console.is_terminal:
            if total and done == total and self._last != stage:
                self._console.print(f"  {stage}: {total}", markup=False)
                self._last = stage
            elif total and done < total:
                self._lines(stage, done, total)
            return
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._stages[stage], completed=done, total=total or None)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")
