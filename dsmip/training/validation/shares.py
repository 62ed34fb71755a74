"""Shares of items: each worker prepares its own, in the batches that one worker alone would make.

So what is prepared of an item is the same to the last bit for any number of workers.
"""

from collections.abc import Callable

from dsmip import distributed
from dsmip.data.table import Table, concatenate


def own_share(count: int, size: int) -> range:
    """This worker's items of `count`, whole batches of `size`; none where there are fewer batches than workers."""
    rank, world, batches = distributed.rank(), distributed.world_size(), -(-count // size)
    first, stop = (size * (batches * each // world) for each in (rank, rank + 1))
    return range(min(first, count), min(stop, count))


def prepared_share(share: range, prepare: Callable[[range], Table]) -> Table:
    """What `prepare` makes of a share; of an empty one the columns alone."""
    return prepare(share) if len(share) else prepare(range(1)).take(slice(0, 0))


def gather_table(own: Table) -> Table:
    """Rows of all workers in rank order (no gradient)."""
    named = own.take(slice(None)).tensors()
    everyone = distributed.gather_tensors(list(named.values()))
    return concatenate([Table.of_tensors(dict(zip(named, tensors, strict=True))) for tensors in everyone])
