"""The same function over many tasks in several processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dsmip.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Results in the order of `tasks`. One worker: this process. Function, tasks and results must pickle.

    Raises:
        UserError: a process was killed.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Forking a process that has loaded torch may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(len(tasks), 1)), mp_context=context, initializer=start_worker) as pool:
        try:
            yield from pool.map(function, tasks)
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed (out of memory?); take fewer --workers") from error


def start_worker() -> None:
    """Lets a pool's process end with its parent, and at Ctrl-C, which reaches all, at once and without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Processes outlive a killed parent: they would wait for tasks for ever, or write beside the next run."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
