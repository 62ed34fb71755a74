"""Computing on the CPU with the same bits however many cores there are.

Sums inside a product of matrices depend in their last bits on how many threads share it. So each call computes with one
thread, and several calls run at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST_AT_ONCE = 16  # each holds a batch's activations, half a GiB for a tower of CLIP's size


def map_alone(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """`work(item)` of each item, in order, without gradients; at most two items per thread are under way.

    On the CPU each call has one thread, and as many run at once as torch may use threads. On other devices one call
    runs after the other.
    """

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
