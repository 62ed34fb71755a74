"""Progress of long work, as a callable."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""
CountRows = Callable[[int], None]
"""Called with how many more rows are done."""


def no_progress(what: str, done: int, total: int) -> None:
    """Shows nothing."""


def counting(progress: Progress, what: str, total: int) -> CountRows:
    """Tells `progress` how many rows are done in all."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return add
