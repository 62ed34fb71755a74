"""False negatives of training batches: how often two mentions of one gold meet in one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.inspection.columns import Ints
from dsmip.data.sampler import count_steps, step_bounds, windows

BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class SameGold:
    """Pairs of mentions with the same gold in the batches of one epoch, which count as negatives unless masked.

    Attributes:
        batch_size: Mentions of a batch.
        num_batches: Batches of the epoch.
        mean: Pairs of a batch, on average.
        largest: Most pairs of a batch.
        batches_with_any: Batches with a pair.
        expected_mean: The mean of batches that are drawn at random from the same mentions.
    """

    batch_size: int
    num_batches: int
    mean: float
    largest: int
    batches_with_any: int
    expected_mean: float


def same_gold_pairs(
    gold_M: Ints, shard_sizes: Sequence[int], *, batch_size: int = BATCH_SIZE, seed: int = 0, epoch: int = 0
) -> SameGold:
    """Counts the pairs in the very batches that training reads.

    Args:
        gold_M: Entity rows of the training mentions, int64 [M], in shard order.
        shard_sizes: Mentions of each shard.
        batch_size: Mentions of a batch.
        seed: That of the training.
        epoch: Which epoch.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    order = [starts[shard] + index for window in windows(shard_sizes, seed, epoch) for shard, index in window.order]
    gold = gold_M[np.array(order, np.int64)]
    num_steps = count_steps(len(gold), batch_size)
    steps = [step_bounds(len(gold), num_steps, step, 0, 1) for step in range(num_steps)]
    pairs = np.array([_num_pairs(gold[step.start : step.stop]) for step in steps], np.int64)
    chance = _num_pairs(gold) / max(len(gold) * (len(gold) - 1) / 2, 1)
    expected = [len(step) * (len(step) - 1) / 2 * chance for step in steps]
    return SameGold(
        batch_size,
        num_steps,
        float(pairs.mean()) if num_steps else 0.0,
        int(pairs.max(initial=0)),
        int((pairs > 0).sum()),
        float(np.mean(expected)) if num_steps else 0.0,
    )


def _num_pairs(gold: Ints) -> int:
    counts = np.unique(gold, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())
