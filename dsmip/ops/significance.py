"""Uncertainty of metrics over mentions: bootstrap and paired randomisation. M mentions, R resamples, K metrics.

A metric is judged over the mentions it was measured on. The bootstrap draws M of them with replacement and measures
again; two systems are compared on the same draw (paired). The randomisation test asks how often a difference as large
comes about when, mention by mention, chance decides which system made which result. Sources: Efron and Tibshirani, An
Introduction to the Bootstrap (1993), ch. 13 (percentiles); Noreen, Computer-Intensive Methods (1989), ch. 2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DRAWS_AT_ONCE = 1 << 20  # bounds memory: R x M draws are made in chunks of about this size


def resamples(num_mentions: int, num_resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Bootstrap samples: mention indices int64 [r, M] on the generator's device, in chunks whose r add up to R.

    Raises:
        ValueError: There is no mention or no resample to draw.
    """
    _check_counts(num_mentions, num_resamples)
    for size in _chunk_sizes(num_mentions, num_resamples):
        yield torch.randint(num_mentions, (size, num_mentions), generator=generator, device=generator.device)


def percentile_interval(resampled_RK: Tensor, level: float = 0.95) -> Tensor:
    """Low and high ends float64 [2, K] that hold the middle `level` of R resampled values (linear interpolation).

    Args:
        resampled_RK: float [R, K].
        level: Between 0 and 1.

    Raises:
        ValueError: `level` is not between 0 and 1.

    >>> percentile_interval(torch.arange(101.0)[:, None], level=0.5).T
    tensor([[25., 75.]], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=resampled_RK.device)
    return torch.quantile(resampled_RK.double(), ends, dim=0)


def count_extreme(differences_MK: Tensor, signs_RM: Tensor) -> Tensor:
    """int64 [K]: in how many of R sign patterns the sum of differences is at least as far from 0 as it is unflipped.

    Sums that are equal but for rounding count as equal.

    Args:
        differences_MK: float64 [M, K], second system minus first.
        signs_RM: float64 [R, M] of 1 and -1.
    """
    observed_K = differences_MK.sum(dim=0).abs()
    rounding_K = 1e-12 * differences_MK.abs().sum(dim=0)
    return ((signs_RM @ differences_MK).abs() >= observed_K - rounding_K).sum(dim=0)


def randomisation_p_values(differences_MK: Tensor, num_flips: int, generator: torch.Generator) -> Tensor:
    """Two-sided p-values float64 [K] of the paired randomisation test on means over mentions.

    Flipping a sign swaps the two systems on that mention, in all metrics at once. p = (1 + extreme) / (1 + R), which is
    never 0 and keeps the test's level for any R (Phipson and Smyth, 2010).

    Args:
        differences_MK: float64 [M, K], second system minus first, on the generator's device.

    Raises:
        ValueError: There is no mention or no flip.
    """
    _check_counts(len(differences_MK), num_flips)
    differences_MK = differences_MK[(differences_MK != 0).any(dim=1)]  # the others add nothing to any sum
    num_mentions, num_metrics = differences_MK.shape
    extreme_K = torch.zeros(num_metrics, dtype=torch.int64, device=differences_MK.device)
    for size in _chunk_sizes(num_mentions, num_flips):
        bits_RM = torch.randint(2, (size, num_mentions), generator=generator, device=generator.device)
        extreme_K += count_extreme(differences_MK, bits_RM.double() * 2 - 1)
    return (1 + extreme_K).double() / (1 + num_flips)


def _chunk_sizes(num_mentions: int, num_draws: int) -> Iterator[int]:
    size = max(DRAWS_AT_ONCE // max(num_mentions, 1), 1)
    for start in range(0, num_draws, size):
        yield min(size, num_draws - start)


def _check_counts(num_mentions: int, num_draws: int) -> None:
    if num_mentions < 1 or num_draws < 1:
        raise ValueError(f"{num_mentions} mentions, {num_draws} draws: both must be at least 1")
