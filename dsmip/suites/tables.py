"""Tables of a suite as texts of cells: figures beside published ones, tests, relative decline, parameter counts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmip.evaluation.metrics import METRICS
from dsmip.suites.figures import Cell, Result, Tested, best_rows, cells
from dsmip.suites.members import Column, Row, percent
from dsmip.suites.published import Published, published_figures, published_parameters
from dsmip.suites.schema import ParameterSuite, Suite
from dsmip.suites.significance import LEVEL, POWER

NOTHING = "-"
_OTHER_PROTOCOL = "\u2020"


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell's text."""

    text: str
    bold: bool = False


@dataclass(frozen=True, slots=True)
class TableView:
    """A table as it is shown.

    Attributes:
        notes: Below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()


def metric_name(metric: str) -> str:
    """A metric as headers have it: those between 0 and 1 in percent."""
    return f"{metric}, %" if METRICS[metric].is_bounded else metric


def shown(metric: str, value: float) -> str:
    """A figure as tables have it."""
    return f"{scaled(metric, value):.2f}"


def scaled(metric: str, value: float) -> float:
    """A figure in the unit of `metric_name`."""
    return 100 * value if METRICS[metric].is_bounded else value


def figure_tables(
    suite: Suite, rows: Sequence[Row], results: Sequence[Result], tested: Sequence[Tested]
) -> list[TableView]:
    """A table for each data set and share: mean and deviation over seeds, what was published, and p-values."""
    by_metric = {metric: cells(results, metric) for metric in suite.metrics}
    columns = [Column(data, share) for data in suite.data for share in suite.shares]
    return [_figure_table(suite, rows, column, by_metric, results, tested) for column in columns]


def _figure_table(
    suite: Suite,
    rows: Sequence[Row],
    column: Column,
    by_metric: Mapping[str, Mapping[tuple[str, Column], Cell]],
    results: Sequence[Result],
    tested: Sequence[Tested],
) -> TableView:
    published = {
        row.name: found
        for row in rows
        if column.share == 1 and (found := published_figures().get((row.name, column.data))) is not None
    }
    tests = {each.other.name: each for each in tested if each.column == column}
    best = {metric: best_rows(by_metric[metric], column, metric) for metric in suite.metrics}
    header = ["system"]
    for metric in suite.metrics:
        header += [metric_name(metric), *(["published"] if _has(published, metric) else [])]
    header += ["seeds", *(["p, Holm"] if suite.significance else [])]
    lines, notes = [], []
    for row in rows:
        protocol = next(
            (r.evaluation.protocol for r in results if (r.row, r.column) == (row, column) and r.evaluation.protocol),
            None,
        )
        theirs = published.get(row.name)
        differences = theirs.differences(protocol) if theirs is not None and protocol is not None else []
        if differences:
            notes.append(f"{_OTHER_PROTOCOL} {row.label}: {'; '.join(differences)}.")
        line, seeds = [Entry(row.label)], 0
        for metric in suite.metrics:
            cell = by_metric[metric].get((row.name, column))
            seeds = cell.num_seeds if cell is not None else 0
            line.append(Entry(_cell(metric, cell), row.name in best[metric]))
            if _has(published, metric):
                line.append(_printed(theirs, metric, bool(differences)))
        line.append(Entry(f"{seeds} of {len(suite.seeds)}"))
        if suite.significance is not None:
            line.append(Entry(_p_value(tests.get(row.name))))
        lines.append(tuple(line))
    sources = dict.fromkeys(f"Published: {each.source.cite}." for each in published.values())
    if suite.significance is not None:
        tested_label = next((row.label for row in rows if row.name == suite.significance.of), suite.significance.of)
        sources[f"p: {tested_label} against the row, {suite.significance.metric}, corrected over all tables."] = None
    if notes:
        notes.insert(0, f"{_OTHER_PROTOCOL} The published figure is of another protocol:")
    return TableView(_title(suite, column), tuple(header), tuple(lines), (*sources, *notes))


def comparison_table(suite: Suite, tested: Sequence[Tested]) -> TableView | None:
    """Every test, and the smallest difference that its mentions can show; None where nothing is tested."""
    if suite.significance is None or not tested:
        return None
    metric = suite.significance.metric
    points = "points" if METRICS[metric].is_bounded else metric
    header = (
        "data",
        "against",
        tested[0].row.label,
        "the other",
        f"difference, {points}",
        "p",
        "p, Holm",
        "smallest",
        "groups",
        "largest",
    )
    lines = []
    for each in tested:
        label = f"{each.other.label} (best)" if each.best else each.other.label
        about = [Entry(column_label(suite, each.column)), Entry(label)]
        about += [
            Entry(shown(metric, value) if math.isfinite(value) else NOTHING) for value in (each.first, each.second)
        ]
        test = each.test
        if test is None or each.adjusted is None:
            lines.append((*about, Entry(f"not tested: {each.why}"), *[Entry("")] * 5))
            continue
        smallest = NOTHING if test.smallest is None else shown(metric, test.smallest)
        texts = [f"{scaled(metric, test.difference):+.2f}", f"{test.p_value:.4f}", f"{each.adjusted:.4f}", smallest]
        texts += [str(test.num_groups), str(test.largest)]
        significant = each.adjusted < LEVEL
        lines.append((*about, *(Entry(text, significant and place == 2) for place, text in enumerate(texts))))
    notes = (
        "Two-sided paired randomisation test on the means over the seeds that both have; systems are swapped on whole "
        "groups of mentions that share a sentence, a picture or a gold, directly or by others. It judges these runs on "
        "other mentions, not other seeds.",
        f"p, Holm: corrected over all {sum(each.test is not None for each in tested)} tests; bold below {LEVEL:g}.",
        f"smallest: the difference that such a test, uncorrected, finds with probability {POWER:g}, were it there.",
    )
    return TableView(f"{tested[0].row.label} against the others, {metric_name(metric)}", header, tuple(lines), notes)


def decline_table(suite: Suite, rows: Sequence[Row], results: Sequence[Result]) -> TableView | None:
    """How much of the first metric is lost with a share of the training mentions; None without shares to compare."""
    metric, found = suite.metrics[0], relative_decline(suite, results)
    low = [share for share in suite.shares if share < 1]
    if not low or 1 not in suite.shares:
        return None
    columns = [Column(data, share) for data in suite.data for share in low]
    lines = [
        (
            Entry(row.label),
            *(
                Entry(NOTHING if (row.name, column) not in found else f"{100 * found[row.name, column]:.1f} %")
                for column in columns
            ),
        )
        for row in rows
    ]
    header = ("system", *(column_label(suite, column) for column in columns))
    notes = ("(all - share) / all, of the means over seeds.",)
    return TableView(f"Relative decline of {metric} with fewer training mentions", header, tuple(lines), notes)


def relative_decline(suite: Suite, results: Sequence[Result]) -> dict[tuple[str, Column], float]:
    """(all - share) / all of the first metric, by row and column; of a metric that is better when low, the rise."""
    metric = suite.metrics[0]
    found, declines = cells(results, metric), {}
    sign = 1 if METRICS[metric].is_bounded else -1
    for (row, column), cell in found.items():
        whole = found.get((row, Column(column.data, 1.0)))
        if whole is not None and whole.mean:
            declines[row, column] = sign * (whole.mean - cell.mean) / whole.mean
    return declines


def parameter_table(suite: ParameterSuite, counts: Mapping[str, tuple[int, int]]) -> TableView:
    """Trained and all parameters of each row, in millions, beside what was published.

    Args:
        counts: Trained and all, by row.
    """
    published = published_parameters()
    lines, notes = [], dict[str, None]()
    for name, about in suite.parameters.items():
        trained, total = counts[name]
        theirs = published.get(name)
        if theirs is not None:
            notes[f"Published: {theirs[1].cite}."] = None
        texts = [f"{trained / 1e6:.2f}", NOTHING if theirs is None else f"{theirs[0]:g}", f"{total / 1e6:.2f}"]
        lines.append((Entry(about.label or name), *map(Entry, texts)))
    return TableView(suite.title, ("", "trained, M", "published, M", "of, M"), tuple(lines), tuple(notes))


def column_label(suite: Suite, column: Column) -> str:
    """A column in words."""
    label = suite.data[column.data].label or column.data
    return label if column.share == 1 else f"{label}, first {percent(column.share)}"


def _title(suite: Suite, column: Column) -> str:
    share = "" if column.share == 1 else f", the first {percent(column.share)} of its training mentions"
    return f"{suite.data[column.data].label or column.data}{share}"


def _has(published: Mapping[str, Published], metric: str) -> bool:
    return any(metric in each.figures for each in published.values())


def _cell(metric: str, cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    deviation = "" if cell.deviation is None else f" \u00b1 {shown(metric, cell.deviation)}"
    return shown(metric, cell.mean) + deviation


def _printed(theirs: Published | None, metric: str, other: bool) -> Entry:
    if theirs is None or metric not in theirs.figures:
        return Entry(NOTHING)
    return Entry(shown(metric, theirs.figures[metric]) + _OTHER_PROTOCOL * other)


def _p_value(tested: Tested | None) -> str:
    if tested is None or tested.adjusted is None:
        return NOTHING
    return f"{tested.adjusted:.4f}"
