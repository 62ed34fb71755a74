"""Figures of evaluated runs as rows of tables: of models, groups, experts, and of mentions that are alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from markupsafe import Markup

from dsmip.data.dataset import Dataset
from dsmip.evaluation.experts.oracle import oracle
from dsmip.evaluation.groups import num_meanings
from dsmip.evaluation.metrics import confidence, shown_metrics, summarise
from dsmip.evaluation.stored.layout import evaluation_name
from dsmip.ops.ranking import Counts
from dsmip.reporting.charts import interval_marks, share_bar
from dsmip.reporting.evaluations import EvaluatedRun, Key

ORACLE = "oracle"
GROUP_METRICS = ("hits@1", "mrr")
_RANKS = ("mean_rank", "median_rank")
_MEANINGS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, None))
_LENGTHS = ((0, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, None))


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a table.

    Attributes:
        value: In full, as it is stored.
        text: As it is shown.
        interval: Its 95 % interval as it is shown; "" where none is known.
    """

    value: float
    text: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model among the others of its run.

    Attributes:
        name: The model's.
        about: What it is besides.
        figures: By metric; empty where it is not evaluated.
        command: That evaluates it; "" where it is.
    """

    name: str
    about: str
    figures: tuple[Figure, ...] = ()
    command: str = ""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Mentions that have something in common.

    Attributes:
        value: What.
        mentions: How many.
        figures: By run, then by metric of GROUP_METRICS.
        marks: hits@1 of each run with its interval, drawn.
    """

    value: str
    mentions: int
    figures: tuple[tuple[Figure, ...], ...]
    marks: Markup


@dataclass(frozen=True, slots=True)
class GroupTable:
    """Rows of one group.

    Attributes:
        name: The group's, or what mentions are told apart by.
        note: How.
        rows: One for each value.
    """

    name: str
    note: str
    rows: tuple[GroupRow, ...]


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """How often an expert was chosen, and how well it did where it scored the best entity."""

    name: str
    pair_share: Figure
    gold_share: Figure
    mentions: int
    without_image: int
    hits: Figure | None


@dataclass(frozen=True, slots=True)
class GateUsage:
    """The experts of the shown model.

    Attributes:
        rows: One for each.
        ties: Share of pairs for which another expert was as good a choice; None where that is not known.
        by_kind: Gold shares by kind, drawn.
    """

    rows: tuple[ExpertRow, ...]
    ties: Figure | None
    by_kind: tuple[tuple[str, Markup], ...] = field(default=())


def figure(name: str, value: float, interval: Sequence[float] | None = None) -> Figure:
    """A metric's value as tables show it."""
    digits = 1 if name.startswith(_RANKS) else 3
    shown = "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
    return Figure(value, f"{value:.{digits}f}", shown)


def model_rows(run: EvaluatedRun) -> list[ModelRow]:
    """All that a run has, with figures or the command that makes them; after the experts their oracle."""
    rows = []
    for name in run.names:
        about = " and ".join(
            filter(None, ["shown below" if name == run.shown else "", "expert" if name in run.experts else ""])
        )
        if name in run.stored:
            metrics = run.stored[name].metrics
            rows.append(ModelRow(name, about, _figures(shown_metrics(), metrics["overall"], metrics)))
        else:
            rows.append(ModelRow(name, about, command=run.evaluate_command(name)))
    if experts := run.expert_ranks():
        folder = run.parts.storage.folder
        best = oracle({name: folder / evaluation_name(run.split, name) for name in experts})["overall"]
        about = "the best expert for each mention, as if one knew"
        rows.append(ModelRow(ORACLE, about, tuple(figure(name, best[name]) for name in shown_metrics())))
    return rows


def group_tables(runs: Sequence[EvaluatedRun]) -> list[GroupTable]:
    """The groups of metrics.json; values of the first run."""
    metrics = [run.main.metrics["groups"] for run in runs]
    tables = []
    for name, values in metrics[0].items():
        rows = []
        for value in values:
            found = [each.get(name, {}).get(value) for each in metrics]
            if all(found):
                rows.append(_group_row(value or "(none)", found))
        tables.append(GroupTable(name, "", tuple(rows)))
    return tables


def difficulty_tables(runs: Sequence[EvaluatedRun], dataset: Dataset) -> list[GroupTable]:
    """Mentions by how many entities share the name, and by the length of the text.

    Raises:
        UserError: A shard is missing or damaged.
    """
    keys = list(runs[0].main.rows)
    rows = list(runs[0].main.rows.values())
    meanings = num_meanings(dataset, [row["word"] for row in rows])
    lengths = [len(row["sentence"].split()) for row in rows]
    of_name = "Entities with the mention's word for a name, and golds of mentions with this word."
    return [
        GroupTable("entities with this name", of_name, _rows_of(runs, keys, meanings, _MEANINGS)),
        GroupTable("words of the sentence", "Parted at white space.", _rows_of(runs, keys, lengths, _LENGTHS)),
    ]


def gate_usage(run: EvaluatedRun) -> GateUsage | None:
    """Of the shown model; None where it chooses no expert."""
    usage = run.main.metrics.get("experts")
    if not usage:
        return None
    rows = []
    experts = run.main.experts(run.experts)
    for name in experts:
        best = usage.get("best", {}).get(name, {})
        hits = figure("hits@1", best["hits@1"]) if "hits@1" in best else None
        rows.append(
            ExpertRow(
                name,
                figure("share", usage["pair_share"][name]),
                figure("share", usage["gold_share"][name]),
                best.get("mentions", 0),
                best.get("without_image", 0),
                hits,
            )
        )
    ties = figure("share", usage["tie_share"]) if "tie_share" in usage else None
    by_kind = tuple(
        (kind, share_bar([(name, shares["gold_share"][name]) for name in experts]))
        for kind, shares in usage.get("by_kind", {}).items()
    )
    return GateUsage(tuple(rows), ties, by_kind)


def _figures(names: Sequence[str], values: Mapping[str, float], intervals: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Of metrics that are stored; `intervals` holds them under `confidence`."""
    known = intervals.get("confidence", {})
    return tuple(figure(name, values[name], known.get(name)) for name in names if name in values)


def _group_row(value: str, found: Sequence[Mapping[str, Any]]) -> GroupRow:
    marks = [(each["hits@1"], each.get("confidence", {}).get("hits@1")) for each in found]
    figures = tuple(_figures(GROUP_METRICS, each, each) for each in found)
    return GroupRow(value, int(found[0]["mentions"]), figures, interval_marks(marks))


def _rows_of(
    runs: Sequence[EvaluatedRun], keys: Sequence[Key], numbers: Sequence[int], bins: Sequence[tuple[int, int | None]]
) -> tuple[GroupRow, ...]:
    """A row for each bin (first and last number) that some mention is in, with intervals as in metrics.json."""
    counts = [run.main.counts(keys) for run in runs]
    rows = []
    for first, last in bins:
        inside = _inside(first, last)
        rows_M = torch.tensor([inside(number) for number in numbers])
        if rows_M.any():
            found = [_measured(Counts(each.better_M[rows_M], each.tied_M[rows_M])) for each in counts]
            value = f"{first} and more" if last is None else f"{first} to {last}" if first < last else str(first)
            rows.append(_group_row(value, found))
    return tuple(rows)


def _inside(first: int, last: int | None) -> Callable[[int], bool]:
    return lambda number: first <= number and (last is None or number <= last)


def _measured(counts: Counts) -> dict[str, Any]:
    intervals = confidence(counts, torch.Generator().manual_seed(0))
    return {**summarise(counts), "confidence": intervals, "mentions": len(counts.better_M)}
