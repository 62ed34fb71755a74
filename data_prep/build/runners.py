"""Runners of tasks: one after the other, or in processes of this machine. The jobs add one for a cluster."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Protocol, TypeVar

import torch

from dsmip.errors import UserError
from dsmip.parallel import start_worker

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")
Tick = Callable[[int], None]

_POLL_SECONDS = 0.2


class Task(Protocol[Result_co]):
    """A task with all that it needs, so that it can be done anywhere that sees the files."""

    def run(self, tick: Tick) -> Result_co:
        """Does it and returns what it made; `tick(n)` is called after every n items."""


class Runner(Protocol):
    """Does tasks in any order."""

    def __call__(self, tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
        """Yields what each task made; `tick` takes the number of items done since its last call."""


def run_serially(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
    """Does one task after the other, in this process."""
    return (task.run(tick) for task in tasks)


@contextmanager
def run_in_processes(num_workers: int) -> Iterator[Runner]:
    """A runner with a pool of processes of its own, until the block ends."""
    # Forking a process that has loaded torch or Ray may hang.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start, initargs=(counter,)) as pool:

        def run(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
            pending: set[Future[Any]] = {pool.submit(_run, task) for task in tasks}
            ticked = counter.value
            try:
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    ticked, before = counter.value, ticked
                    tick(ticked - before)
                    yield from (future.result() for future in done)
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed (out of memory?); run the command again to go on"
                ) from error

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)


_counter: "Synchronized[int] | None" = None


def _start(counter: "Synchronized[int]") -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)  # there is a process per core
    start_worker()


def _run(task: Task[Result]) -> Result:
    def tick(count: int) -> None:
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += count

    return task.run(tick)
