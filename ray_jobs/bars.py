"""One-process work shown as a bar on a terminal, and as nothing elsewhere. Knows no Ray."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from dsmip.progress import Progress

_PLAIN_WIDTH = 110  # of tables that go to a file or a pipe


def plain_console() -> Console:
    """Where results are printed."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Takes progress and shows one bar for each kind of work, on stderr, until the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with RichProgress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress
