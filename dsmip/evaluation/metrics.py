"""The reported metrics of ranks: one definition for figures, bootstrap intervals and paired comparisons.

M mentions, R resamples, K metrics, S seeds, X any number of leading dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsmip.ops import ranking as ops
from dsmip.ops.significance import percentile_interval, randomisation_p_values, resamples

HITS_AT = (1, 3, 5, 10, 20)
ADJUSTED = ("mean_rank_index", "mrr")  # for chance
LEVEL = 0.95  # of all intervals
NUM_RESAMPLES = 2_000
NUM_FLIPS = 10_000


@dataclass(frozen=True)
class Metric:
    """A figure of ranks.

    Attributes:
        of: makes float64 [X] of ranks float [..., M].
        ranks: makes the ranks of counts, by the rule for ties.
        is_mean: it is the mean of each mention's own figure, as a randomisation test needs.
        is_bounded: it is defined where a gold has no rank (infinity), as among candidates.
        shown: displays have it.
        shown_of_candidates: so does the display of figures among candidates.
    """

    of: Callable[[Tensor], Tensor]
    ranks: Callable[[ops.Counts], Tensor] = ops.realistic_ranks
    is_mean: bool = True
    is_bounded: bool = False
    shown: bool = True
    shown_of_candidates: bool = False


METRICS: dict[str, Metric] = {
    **{
        f"hits@{k}": Metric(
            partial(ops.hits_at, k=k), is_bounded=True, shown=k in (1, 3, 5), shown_of_candidates=k in (1, 5, 20)
        )
        for k in HITS_AT
    },
    "mrr": Metric(ops.mean_reciprocal_rank, is_bounded=True, shown_of_candidates=True),
    "mean_rank": Metric(ops.mean_rank),
    "mean_rank_optimistic": Metric(ops.mean_rank, ops.optimistic_ranks, shown=False),
    "mean_rank_pessimistic": Metric(ops.mean_rank, ops.pessimistic_ranks, shown=False),
    "median_rank": Metric(ops.median_rank, is_mean=False, shown=False),
}
"""The metrics by name: reports, intervals, comparisons, the oracle, figures of candidates and displays have these."""


def shown_metrics() -> tuple[str, ...]:
    """Names of those that displays have."""
    return tuple(name for name, metric in METRICS.items() if metric.shown)


@dataclass(frozen=True)
class Difference:
    """A metric of two systems on the same mentions.

    Attributes:
        first, second: Each system's figure, of several seeds their mean.
        difference: Second minus first.
        interval: Of the difference; paired bootstrap over mentions, and over the seeds where there are several; 95 %.
        p_value: Of a paired randomisation test over mentions; None for a metric that is no mean.
        deviations: Standard deviation over each system's seeds; None of one seed.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float | None
    deviations: tuple[float | None, float | None] = (None, None)


def measure(counts: ops.Counts, metrics: Mapping[str, Metric] = METRICS) -> dict[str, Tensor]:
    """Metrics of counts int64 [..., M], each float64 [X]; realistic ranks unless the name says otherwise.

    Raises:
        ValueError: M is 0.
    """
    return {name: metric.of(metric.ranks(counts)) for name, metric in metrics.items()}


def measure_among(ranks_M: Tensor) -> dict[str, float]:
    """The bounded metrics of ranks float64 [M] among candidates; infinity where the gold is none of them."""
    return {name: float(metric.of(ranks_M)) for name, metric in METRICS.items() if metric.is_bounded}


def summarise(counts: ops.Counts) -> dict[str, float]:
    """The metrics of counts int64 [M] as numbers; hits and MRR are fractions 0 to 1."""
    return {name: float(value) for name, value in measure(counts).items()}


def adjusted(metrics: Mapping[str, float], num_entities: int) -> dict[str, float]:
    """Mean rank and MRR adjusted for chance, which compare over kbs of different sizes; none over a single entity."""
    if num_entities < 2:
        return {}
    mean_rank, mrr = (torch.tensor(metrics[name], dtype=torch.float64) for name in ("mean_rank", "mrr"))
    found = ops.adjusted_mean_rank_index(mean_rank, num_entities), ops.adjusted_mean_reciprocal_rank(mrr, num_entities)
    return dict(zip(ADJUSTED, map(float, found), strict=True))


def confidence(
    counts: ops.Counts, generator: torch.Generator, *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap interval (low, high) over mentions of each metric; counts are int64 [M] where the generator is."""
    resampled = [
        _stack(measure(_take(counts, rows_RM))) for rows_RM in resamples(len(counts.better_M), num_resamples, generator)
    ]
    return _intervals(list(summarise(counts)), torch.cat(resampled))


def compare_counts(
    first: ops.Counts,
    second: ops.Counts,
    generator: torch.Generator,
    *,
    metrics: Mapping[str, Metric] = METRICS,
    num_resamples: int = NUM_RESAMPLES,
    num_flips: int = NUM_FLIPS,
) -> dict[str, Difference]:
    """Each metric of two systems on the same mentions in the same order.

    Args:
        first, second: counts int64 [M] each, or of several seeds [S, M]; their numbers of seeds may differ.
        generator: Of the resamples and sign flips.

    Raises:
        ValueError: They have different numbers of mentions, or none.
    """
    sides = [_by_seed(each) for each in (first, second)]
    num_mentions, others = (each.better_M.shape[1] for each in sides)
    if num_mentions != others:
        raise ValueError(f"{num_mentions} mentions against {others}: nothing to pair")
    figures = [measure(each, metrics) for each in sides]
    resampled = []
    for rows_RM in resamples(num_mentions, num_resamples, generator):
        before_RK, after_RK = (_resampled(each, rows_RM, generator, metrics) for each in sides)
        resampled.append(after_RK - before_RK)
    intervals = _intervals(list(metrics), torch.cat(resampled))
    before_MK, after_MK = (_stack(measure(_single(each), metrics)).mean(dim=0) for each in sides)
    p_values = dict(
        zip(metrics, randomisation_p_values(after_MK - before_MK, num_flips, generator).tolist(), strict=True)
    )
    found = {}
    for name, metric in metrics.items():
        (before_S, after_S), p_value = (each[name] for each in figures), p_values[name]
        before, after = float(before_S.mean()), float(after_S.mean())
        found[name] = Difference(
            before,
            after,
            after - before,
            intervals[name],
            p_value if metric.is_mean else None,
            (_deviation(before_S), _deviation(after_S)),
        )
    return found


def _by_seed(counts: ops.Counts) -> ops.Counts:
    """[S, M] of counts of one seed or several."""
    return ops.Counts(*(each.reshape(-1, each.shape[-1]) for each in counts))


def _resampled(
    counts: ops.Counts, rows_RM: Tensor, generator: torch.Generator, metrics: Mapping[str, Metric]
) -> Tensor:
    """Means over as many seeds, drawn with replacement, as there are, on resampled mentions: float64 [R, K]."""
    num_seeds, num_resamples = len(counts.better_M), len(rows_RM)
    seeds_RS = torch.zeros(num_resamples, 1, dtype=torch.int64)
    if num_seeds > 1:
        seeds_RS = torch.randint(num_seeds, (num_resamples, num_seeds), generator=generator)
    drawn = ops.Counts(*(each[seeds_RS[:, :, None], rows_RM[:, None]] for each in counts))
    return _stack(measure(drawn, metrics)).mean(dim=1)


def _deviation(values_S: Tensor) -> float | None:
    return float(values_S.std()) if len(values_S) > 1 else None


def _take(counts: ops.Counts, rows_RM: Tensor) -> ops.Counts:
    return ops.Counts(counts.better_M[rows_RM], counts.tied_M[rows_RM])


def _single(counts: ops.Counts) -> ops.Counts:
    """Every mention as a sample of its own [..., M, 1]: a metric that is a mean is the mean of these."""
    return ops.Counts(counts.better_M[..., None], counts.tied_M[..., None])


def _stack(report: dict[str, Tensor]) -> Tensor:
    """[..., K], metrics in the report's order."""
    return torch.stack(list(report.values()), dim=-1)


def _intervals(names: list[str], resampled_RK: Tensor) -> dict[str, tuple[float, float]]:
    low_K, high_K = percentile_interval(resampled_RK, LEVEL).tolist()
    return {name: (low, high) for name, low, high in zip(names, low_K, high_K, strict=True)}
