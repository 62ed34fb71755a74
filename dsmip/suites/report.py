"""The report of a suite as Markdown, LaTeX, and one page that asks nobody for anything and runs no script."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from dsmip.config import flat
from dsmip.pages.templates import asset, base_style, page_environment
from dsmip.reporting.charts import Line, line_chart
from dsmip.storage.atomic import write_text
from dsmip.suites.figures import Result, cells
from dsmip.suites.members import Row
from dsmip.suites.schema import Suite
from dsmip.suites.tables import Entry, TableView, metric_name, relative_decline, scaled
from dsmip.suites.texts import latex, markdown

MARKDOWN, LATEX, PAGE = "results.md", "results.tex", "results.html"
_PACKAGE = "dsmip.suites"


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step that failed: why, and the end of its log."""

    step: str
    reason: str
    log: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """All that is shown of a suite.

    Attributes:
        warnings: Of all figures: what is missing, what was not made alike.
        protocols: A table for each data set.
    """

    name: str
    title: str
    about: str
    tables: tuple[TableView, ...]
    charts: tuple[Markup, ...] = ()
    protocols: tuple[TableView, ...] = ()
    warnings: tuple[str, ...] = ()
    failures: tuple[StepFailure, ...] = ()


def write_report(folder: Path, report: SuiteReport) -> None:
    """Writes results.md, results.tex and results.html."""
    failed = [f"Failed: {each.step}: {each.reason}" for each in report.failures]
    head = [f"## {report.title}", report.about, *report.warnings, *failed]
    tables = [markdown(view) for view in (*report.tables, *report.protocols)]
    write_text(folder / MARKDOWN, "\n\n".join([*filter(None, head), *tables]))
    labels = [f"tab:{report.name}-{number}" for number in range(1, len(report.tables) + 1)]
    texts = [latex(view, label) for view, label in zip(report.tables, labels, strict=True)]
    write_text(folder / LATEX, "\n".join(["% needs \\usepackage{booktabs}", *texts]))
    style = base_style() + asset("dsmip.reporting", "page.css") + asset(_PACKAGE, "page.css")
    policy = f"default-src 'none'; style-src '{_hash(style)}'"
    template = page_environment(_PACKAGE).get_template("page.html.j2")
    write_text(folder / PAGE, template.render(report=report, style=style, policy=policy))


def share_charts(suite: Suite, rows: Sequence[Row], results: Sequence[Result]) -> list[Markup]:
    """Of each data set the first metric over shares of the training mentions, and how much of it is lost."""
    if len(suite.shares) < 2:
        return []
    metric = suite.metrics[0]
    means = {key: scaled(metric, cell.mean) for key, cell in cells(results, metric).items()}
    lost = {key: 100 * share for key, share in relative_decline(suite, results).items()}
    charts = []
    for data, about in suite.data.items():
        label = about.label or data
        for title, name, values in (
            (f"{label}: {metric_name(metric)}", metric_name(metric), means),
            (f"{label}: relative decline", "decline, %", lost),
        ):
            lines = []
            for row in rows:
                points = sorted(
                    (100 * at.share, y) for (its, at), y in values.items() if (its, at.data) == (row.name, data)
                )
                if points:
                    lines.append(Line(row.label, points))
            if lines:
                charts.append(line_chart(title, lines, x="training mentions, %", y=name, x_range=(0, 100)))
    return charts


def protocol_tables(suite: Suite, results: Sequence[Result]) -> list[TableView]:
    """What the evaluations of each data set have in common: how their figures were made."""
    found = []
    for data, about in suite.data.items():
        protocols = [
            flat(each.evaluation.protocol.model_dump(mode="json", exclude={"seed", "tune_seed"}))
            for each in results
            if each.column.data == data and each.evaluation.protocol is not None
        ]
        values: dict[str, list[str]] = {}
        for protocol in protocols:
            for key, value in protocol.items():
                if value is not None and str(value) not in values.setdefault(key, []):
                    values[key].append(str(value))
        lines = tuple((Entry(key), Entry(", ".join(each))) for key, each in values.items())
        if lines:
            found.append(TableView(f"Protocol of {about.label or data}", ("key", "value"), lines))
    return found


def _hash(content: str) -> str:
    """By which a policy names the content of an element that may stand in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
