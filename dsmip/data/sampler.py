"""The order of training: which samples make up a step, as a pure function of (seed, epoch, step).

The N samples of a split are put in an order (shards permuted, then samples permuted inside windows of a few shards, so
that reading stays sequential and memory bounded), cut into steps of nearly equal size, and each step is cut over the
ranks. Every sample comes once per epoch, every rank makes the same number of steps, and the union of the ranks' batches
does not depend on how many ranks there are. A resume position is (epoch, step).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_SHARDS = 4


@dataclass(frozen=True, slots=True)
class Window:
    """A few shards, read together: `order` lists (shard, index in the shard) in the order of training.

    `start` is the position of its first sample in the epoch.
    """

    start: int
    shards: tuple[int, ...]
    order: tuple[tuple[int, int], ...]


def draw(num_choices: int, *label: str | int) -> int:
    """A choice in 0 .. num_choices that depends on the label's text alone."""
    return _seed(label) % num_choices


def windows(shard_sizes: Sequence[int], seed: int, epoch: int) -> Iterator[Window]:
    """An epoch's samples, window after window."""
    shards = permutation(len(shard_sizes), "shards", seed, epoch).tolist()
    start = 0
    for number, first in enumerate(range(0, len(shards), WINDOW_SHARDS)):
        members = tuple(shards[first : first + WINDOW_SHARDS])
        inside = [(shard, index) for shard in members for index in range(shard_sizes[shard])]
        order = permutation(len(inside), "window", seed, epoch, number)
        yield Window(start, members, tuple(inside[position] for position in order.tolist()))
        start += len(inside)


def permutation(count: int, *label: str | int) -> NDArray[np.int64]:
    """A permutation of 0 .. count that depends on the label's text alone, the same in every release of numpy.

    Raw bits of a bit generator are stable by numpy's promise; `Generator.permutation` is not.
    """
    bits = np.random.PCG64(_seed(label)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


def step_bounds(num_samples: int, num_steps: int, step: int, rank: int, world_size: int) -> range:
    """Positions in the epoch of one rank's share of a step; sizes differ by at most one over steps and over ranks."""
    start, stop = num_samples * step // num_steps, num_samples * (step + 1) // num_steps
    size = stop - start
    return range(start + size * rank // world_size, start + size * (rank + 1) // world_size)


def count_steps(num_samples: int, batch_size: int) -> int:
    """Steps of an epoch: ceil(samples / batch size)."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return -(-num_samples // batch_size)


def _seed(label: tuple[str | int, ...]) -> int:
    text = "/".join(str(each) for each in label)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
