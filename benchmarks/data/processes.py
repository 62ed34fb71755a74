"""The same work in several processes at once, each of one thread, timed in each from a common start."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Pace:
    """What processes did at once: `count` items in all. wall_s: of the slowest. cpu_s: of all together."""

    count: int
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Items a second, of all processes together."""
        return self.count / self.wall_s

    @property
    def cpu_us(self) -> float:
        """Processor microseconds an item."""
        return 1e6 * self.cpu_s / self.count


class Processes:
    """Up to `count` processes, to be used in a `with` statement."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork after torch has started its threads may hang
        barriers = {shares: context.Barrier(shares) for shares in range(1, count + 1)}
        self._pool = ProcessPoolExecutor(count, context, _start, (barriers,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def at_once(self, setup: Callable[..., Callable[[], int]], shares: Sequence[Sequence[Any]]) -> Pace:
        """The work that `setup(*share)` gives, every share in a process of its own; work returns how many items it did.

        Starting the processes, importing and `setup` are not timed.
        """
        futures = [self._pool.submit(_timed, setup, share, len(shares)) for share in shares]
        done = [future.result() for future in futures]
        return Pace(sum(one.count for one in done), max(one.wall_s for one in done), sum(one.cpu_s for one in done))


_barriers: dict[int, Barrier] = {}


def _start(barriers: dict[int, Barrier]) -> None:
    _barriers.update(barriers)
    torch.set_num_threads(1)


def _timed(setup: Callable[..., Callable[[], int]], share: Sequence[Any], num_shares: int) -> Pace:
    work = setup(*share)
    _barriers[num_shares].wait()  # so no process takes two shares
    cpu, wall = time.process_time(), time.perf_counter()
    count = work()
    return Pace(count, time.perf_counter() - wall, time.process_time() - cpu)
