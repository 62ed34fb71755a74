"""Figures of a suite: of each run, their means and deviations over seeds, and tests against the row that is tested."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dsmip.errors import UserError
from dsmip.evaluation.metrics import ADJUSTED, METRICS, adjusted, measure
from dsmip.evaluation.stored.comparison import Evaluation, protocol_differences, read_evaluation
from dsmip.ops import ranking as ops
from dsmip.storage.atomic import atomic_path
from dsmip.storage.locations import Location
from dsmip.suites.members import Column, Member, Row
from dsmip.suites.schema import Significance
from dsmip.suites.significance import GroupedTest, grouped_test, holm

MentionKey = tuple[str, int]
Groups = Callable[[str, Sequence[MentionKey]], Sequence[int]]
"""The group of each mention, given a data set's folder and the mentions' keys."""


@dataclass(frozen=True)
class Result:
    """A run's figures of one model.

    Attributes:
        folder: Of the data root: the run's data.
        evaluation: With the rank of each mention.
    """

    row: Row
    column: Column
    seed: int
    folder: str
    evaluation: Evaluation
    metrics: Mapping[str, float]

    @classmethod
    def read(cls, row: Row, member: Member, run: Location, split: str) -> "Result":
        """What `dsmip evaluate` has written of a member."""
        evaluation = read_evaluation(run, split, row.model)
        records = list(evaluation.records.values())
        counts = ops.Counts(*(torch.tensor([each[name] for each in records]) for name in ("better", "tied")))
        metrics = {name: float(value) for name, value in measure(counts).items()}
        return cls(row, member.column, member.seed, member.folder, evaluation, metrics)


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric over the seeds of a row in a column; the deviation is that of a sample, None of one seed."""

    mean: float
    deviation: float | None
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Tested:
    """The tested row against another one in a column.

    Attributes:
        first, second: Means of the tested row and of the other one over the seeds that both have.
        test: First minus second; None where it could not be made, and `why`.
        adjusted: The p-value after Holm's correction over all tests.
        best: The other row is the best of the others in its column.
    """

    row: Row
    other: Row
    column: Column
    first: float
    second: float
    test: GroupedTest | None
    adjusted: float | None = None
    best: bool = False
    why: str = ""


def cells(results: Iterable[Result], metric: str) -> dict[tuple[str, Column], Cell]:
    """A metric's means by row's name and column."""
    values: dict[tuple[str, Column], list[float]] = {}
    for result in results:
        values.setdefault((result.row.name, result.column), []).append(result.metrics[metric])
    return {
        key: Cell(fmean(found), stdev(found) if len(found) > 1 else None, len(found)) for key, found in values.items()
    }


def best_rows(found: Mapping[tuple[str, Column], Cell], column: Column, metric: str) -> set[str]:
    """The rows whose mean is the best of a column."""
    means = {row: cell.mean for (row, its), cell in found.items() if its == column}
    if not means:
        return set()
    best = max(means.values()) if METRICS[metric].is_bounded else min(means.values())
    return {row for row, mean in means.items() if mean == best}


def compared(results: Sequence[Result], asked: Significance, groups: Groups, *, across: bool = False) -> list[Tested]:
    """Tests of every other row against the tested one, in every column, with p-values corrected over all of them.

    No baseline is picked by its test figures: all are tested, so the best one is, too.

    Args:
        results: All that there are.
        asked: What is tested.
        groups: Of mentions that are not independent.
        across: Also between evaluations that were not made alike.
    """
    by_place: dict[tuple[str, Column], dict[int, Result]] = {}
    rows = {result.row.name: result.row for result in results}
    for result in results:
        by_place.setdefault((result.row.name, result.column), {})[result.seed] = result
    made = []
    for column in dict.fromkeys(result.column for result in results):
        tested = by_place.get((asked.of, column))
        others = [name for name in rows if name != asked.of and (name, column) in by_place]
        if tested is None:
            continue
        means = cells([result for result in results if result.row.name in others], asked.metric)
        best = best_rows(means, column, asked.metric)
        for name in others:
            found = _tested(tested, by_place[name, column], asked.metric, groups, across=across)
            made.append(Tested(rows[asked.of], rows[name], column, *found[:3], best=name in best, why=found[3]))
    corrected = iter(holm([each.test.p_value for each in made if each.test is not None]))
    return [
        each
        if each.test is None
        else Tested(each.row, each.other, each.column, each.first, each.second, each.test, next(corrected), each.best)
        for each in made
    ]


def _tested(
    firsts: Mapping[int, Result], seconds: Mapping[int, Result], metric: str, groups: Groups, *, across: bool
) -> tuple[float, float, GroupedTest | None, str]:
    seeds = sorted(firsts.keys() & seconds.keys())
    sides = [[each[seed] for seed in seeds] for each in (firsts, seconds)]
    if not seeds:
        return float("nan"), float("nan"), None, "no seed in common"
    means = fmean(each.metrics[metric] for each in sides[0]), fmean(each.metrics[metric] for each in sides[1])
    if len(seeds) < 2:
        return *means, None, "one seed in common"
    one = sides[0][0]
    for each in (*sides[0][1:], *sides[1]):
        if _golds(one) != _golds(each):
            return *means, None, "different mentions or golds"
        if (differences := protocol_differences(one.evaluation, each.evaluation)) and not across:
            raise UserError(
                f"{one.evaluation} and {each.evaluation} were not evaluated alike: {'; '.join(differences)}; take "
                "--across if that is what you compare"
            )
    keys = sorted(one.evaluation.records)
    first_M, second_M = (_figures(side, keys, metric) for side in sides)
    generator = torch.Generator().manual_seed(0)
    return *means, grouped_test(first_M - second_M, groups(one.folder, keys), generator), ""


def _golds(result: Result) -> dict[MentionKey, str]:
    return {key: record["gold"] for key, record in result.evaluation.records.items()}


def _figures(side: Sequence[Result], keys: Sequence[MentionKey], metric: str) -> Tensor:
    """A metric of each mention alone, the mean over a row's seeds: float64 [M]."""
    records = [[each.evaluation.records[key] for key in keys] for each in side]
    counts = ops.Counts(
        *(torch.tensor([[each[name] for each in row] for row in records])[..., None] for name in ("better", "tied"))
    )
    return measure(counts, {metric: METRICS[metric]})[metric].mean(dim=0)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes lines of the same keys as parquet, whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.table({name: [line[name] for line in lines] for name in lines[0]}), temporary)


def result_line(suite: str, result: Result) -> dict[str, Any]:
    """A run's figures of one model as a line of results.parquet."""
    protocol = result.evaluation.protocol
    chance = {} if protocol is None else adjusted(result.metrics, protocol.entities)
    return {
        "suite": suite,
        "row": result.row.name,
        "label": result.row.label,
        "system": result.row.system,
        "model": result.row.model,
        "data": result.column.data,
        "share": result.column.share,
        "seed": result.seed,
        "mentions": len(result.evaluation.records),
        **result.metrics,
        **{f"adjusted_{name}": chance.get(name) for name in ADJUSTED},
        "run": str(result.evaluation.run),
        "protocol": None if protocol is None else protocol.model_dump_json(),
    }
