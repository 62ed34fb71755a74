"""Many tasks at once on this machine: in processes, ahead, or in threads that compute with the same bits anywhere.

Sums inside a product of matrices depend in their last bits on how many threads share it. So `map_alone` computes each
call with one thread, and runs several calls at once.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, TypeVar

from dsmip.errors import UserError

if TYPE_CHECKING:
    import torch

Task = TypeVar("Task")
Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST_AT_ONCE = 16  # each holds a batch's activations, half a GiB for a tower of CLIP's size


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


def map_alone(work: Callable[[Item], Result], items: Iterable[Item], device: "torch.device") -> Iterator[Result]:
    """`work(item)` of each item, in order, without gradients; at most two items per thread are under way.

    On the CPU each call has one thread, and as many run at once as torch may use threads. On other devices one call
    runs after the other.
    """
    import torch  # a slow import that the processes of a preparation do without

    def call(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield from map(call, items)
        return
    under_way: deque[Future[Result]] = deque()
    at_once = min(num_threads, _MOST_AT_ONCE)
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            under_way.append(pool.submit(call, item))
            if len(under_way) == 2 * at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what the pool set is also what threads made later would begin with


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """`work(item)` of each item, in order, done ahead of the reader by threads; another one draws the items.

    Held at a time are about `num_threads` results more than the reader has taken. What `work` or the items raise is
    raised here, in its place.
    """

    def results() -> Iterator[Result]:
        under_way: deque[Future[Result]] = deque()
        pool = ThreadPoolExecutor(num_threads)
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) == num_threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    return read_ahead(results(), 1)


def read_ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made up to `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(value: tuple[Item] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # handed over to the reader
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value[0]
    finally:
        stop.set()
