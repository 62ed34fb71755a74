"""A live table of works in stages: a row for each subject, a column for each stage. Knows no Ray."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dsmip.messages import shown
from ray_jobs.terminal.lines import result_console

State = Literal["waiting", "running", "done", "failed", "left out"]
_SHOWN: tuple[State, ...] = ("running", "failed", "left out")
_OTHER_LINES = 6  # than rows: heads, the end, what is out of sight, and a cell of two lines


@dataclass
class _Work:
    row: str
    stage: str
    state: State
    started: float = 0.0


class StageTable:
    """Shows how far works are: on a terminal one table that changes in place, elsewhere a line at every change.

    Use as a context manager around the works.
    """

    def __init__(self, title: str, stages: Sequence[str], console: Console | None = None) -> None:
        """
        Args:
            title: In the first column's head.
            stages: The other columns.
            console: Where it is shown; stdout by default.
        """
        self.console = console or result_console()
        self._title, self._stages = title, tuple(stages)
        self._works: dict[str, _Work] = {}
        self._changes = False
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._changes = True
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._changes = False
            self._live.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):  # this one: of a SIGTERM
            self.say("interrupted; run the command again to go on")

    def add(self, name: str, row: str, stage: str, *, done: bool = False) -> None:
        """Adds a work that waits, or that is done already."""
        self._works[name] = _Work(row, stage, "done" if done else "waiting")

    def set(self, name: str, state: State, about: str = "") -> None:
        """Says that a work's state has changed, and what there is to say about it."""
        work = self._works[name]
        took = "" if state in ("running", "left out") else f" [{time.monotonic() - work.started:.0f} s]"
        work.state = state
        if state == "running":
            work.started = time.monotonic()
        if not self.console.is_terminal or state == "failed":
            said = {"running": "started"}.get(state, state)
            self.say(f"  {name}: {said}{took}{f': {about}' if about else ''}")

    def say(self, line: str) -> None:
        """Prints one line above the table."""
        self.console.print(shown(line), markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(self._title, *self._stages, "now")
        rows: dict[str, dict[str, _Work]] = {}
        for name, work in self._works.items():
            rows.setdefault(work.row, {})[name] = work
        in_sight = self._in_sight(rows)
        for row in in_sight:
            of_row = rows[row]
            cells = [_counts([work.state for work in of_row.values() if work.stage == stage]) for stage in self._stages]
            running = [
                f"{name.rpartition('/')[0] or name} {time.monotonic() - work.started:.0f} s"
                for name, work in of_row.items()
                if work.state == "running"
            ]
            table.add_row(row, *cells, ", ".join(running))
        if len(in_sight) < len(rows):
            table.caption = f"and {len(rows) - len(in_sight)} more rows"
        return table

    def _in_sight(self, rows: Mapping[str, Mapping[str, _Work]]) -> list[str]:
        """All rows; while they change, as many as the terminal has room for, before all others those at work."""
        room = max(1, self.console.height - _OTHER_LINES) if self._changes else len(rows)
        at_work = {row for row, works in rows.items() if any(work.state == "running" for work in works.values())}
        chosen = {*sorted(rows, key=lambda row: row not in at_work)[:room]}
        return [row for row in rows if row in chosen]


def _counts(states: Sequence[State]) -> str:
    """As `2/3, 1 running`."""
    if not states:
        return ""
    counts = Counter(states)
    others = [f"{counts[state]} {state}" for state in _SHOWN if counts[state]]
    return ", ".join([f"{counts['done']}/{len(states)}", *others])
