"""Tests of differences between systems whose mentions come in groups. M mentions, C groups, R flips.

A randomisation test asks how often chance makes a difference as large when it decides which system made which result.
Mentions that share a sentence, a picture or a gold are right and wrong together, so chance decides for a whole group:
flipping each mention alone would take them for independent, and find differences that are none. Several tests of one
table are corrected by Holm's procedure (Scandinavian Journal of Statistics, 1979). The smallest difference that a test
set can show is that of Card et al., With Little Power Comes Great Responsibility (EMNLP 2020).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dsmip.evaluation.metrics import NUM_FLIPS
from dsmip.ops.significance import count_extreme, randomisation_p_values

LEVEL, POWER = 0.05, 0.8
_MOST_ENUMERATED = 13  # groups whose 2^C sign patterns are all looked at: no more of them than flips are drawn


@dataclass(frozen=True, slots=True)
class GroupedTest:
    """A test of a mean difference.

    Attributes:
        difference: Mean over mentions.
        p_value: Two-sided, of the randomisation test over groups.
        smallest: The smallest difference in size that a test on these mentions finds with probability 0.8 at level
            0.05, were it there; None where it cannot be told: fewer than two groups, or no difference in any mention.
        num_groups, largest: How many groups there are, and how many mentions the largest has.
    """

    difference: float
    p_value: float
    smallest: float | None
    num_groups: int
    largest: int


def grouped_test(
    differences_M: Tensor, groups: Sequence[int], generator: torch.Generator, *, num_flips: int = NUM_FLIPS
) -> GroupedTest:
    """The randomisation test that swaps two systems on whole groups of mentions.

    Args:
        differences_M: float64, of each mention.
        groups: The group of each mention, from 0 without a gap.
        generator: Of the sign flips; few groups need none.

    Raises:
        ValueError: No mention, or as many groups as not mentions.
    """
    if len(differences_M) != len(groups) or not groups:
        raise ValueError(f"{len(differences_M)} differences, {len(groups)} groups: nothing to test")
    group_M = torch.tensor(groups)
    sums_C = torch.zeros(max(groups) + 1, dtype=torch.float64).index_add_(0, group_M, differences_M.double())
    sizes_C = torch.bincount(group_M)
    mean = float(differences_M.mean())
    return GroupedTest(
        mean,
        _p_value(sums_C, num_flips, generator),
        _smallest(sums_C - mean * sizes_C, len(groups)),
        len(sums_C),
        int(sizes_C.max()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: one below a level is significant at it among all of these.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def _p_value(sums_C: Tensor, num_flips: int, generator: torch.Generator) -> float:
    sums_C = sums_C[sums_C != 0]  # a group without a difference adds nothing to any sum
    if len(sums_C) > _MOST_ENUMERATED:
        return float(randomisation_p_values(sums_C[:, None], num_flips, generator)[0])
    patterns = torch.arange(2 ** len(sums_C))[:, None] >> torch.arange(len(sums_C)) & 1
    return int(count_extreme(sums_C[:, None], patterns.double() * 2 - 1)[0]) / len(patterns)


def _smallest(deviations_C: Tensor, num_mentions: int) -> float | None:
    """By the normal approximation, with the standard error of a mean over groups.

    Args:
        deviations_C: Of each group's sum from what the mean difference would give it.
    """
    num_groups = len(deviations_C)
    squares = float(deviations_C.square().sum())
    if num_groups < 2 or squares == 0:
        return None
    error = math.sqrt(squares * num_groups / (num_groups - 1)) / num_mentions
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * error
