"""The job `dsmip inspect`: what a dataset holds and its flaws, as tables, JSON and a page. Knows no Ray."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.inspection.findings import Finding, percent, touched
from data_prep.inspection.meanings import Meaning
from data_prep.inspection.presentation.page import write_page
from data_prep.inspection.presentation.tables import VERDICT_NOTE, TextTable, figure_tables, prepared_table
from data_prep.inspection.report import Inspection, inspect_dataset
from dsmip.data.dataset import Dataset
from dsmip.storage.atomic import write_json
from ray_jobs.terminal.display import Display

_TITLES = {"leak": "Leaks", "flaw": "Flaws"}
_STYLES = {"serious": "bold red", "look at it": "yellow", "negligible": "dim"}


def inspect_data(data: str, *, html: Path | None, json_file: Path | None, images: bool, workers: int) -> Inspection:
    """Prints the tables; also writes the page to `html` and the figures to `json_file` when they are given.

    Raises:
        UserError: For what is no dataset, or a damaged one.
    """
    with Display(transient=True) as display:
        found = inspect_dataset(Dataset.open(data), images=images, workers=workers, progress=display)
    if json_file is not None:
        write_json(json_file, found.to_json())
    if html is not None:
        write_page(found, html)
    console = display.console
    console.print(f"{found.name} ({data})")
    for kind, title in _TITLES.items():
        _show_findings(console, title, [finding for finding in found.findings if finding.meaning.kind == kind])
    console.print(VERDICT_NOTE)
    for table in figure_tables(found):
        _show(console, table)
    _explain(console, [(each.label, each.meaning) for each in found.findings if each.name == "same_gold_pairs"])
    _show(console, prepared_table(found))
    _explain(console, [(reason, meaning) for _, reason, _, meaning in touched(found.prepared)])
    more = "what every row means is there too" if html else "a page with what every row means, samples and examples"
    console.print(f"page: {html} ({more})" if html else f"give --html FILE for {more}")
    return found


def _show_findings(console: Console, title: str, findings: list[Finding]) -> None:
    """A table of findings, the worst first, and the words for those that are not negligible."""
    if not findings:
        console.print(f"{title}: none found")
        return
    table = Table("of a mention, or an entity", title=title, title_justify="left")
    for name in ("of", "count", "share", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for finding in findings:
        for each in finding.counts:
            verdict = each.verdict or ""
            figures = (each.name, f"{each.count.count} of {each.count.of}", percent(each.count.share))
            table.add_row(*map(Text, (finding.label, *figures)), Text(verdict, _STYLES.get(verdict, "")))
    console.print(table)
    _explain(console, [(finding.label, finding.meaning) for finding in findings if finding.verdict != "negligible"])


def _explain(console: Console, named: Iterable[tuple[str, Meaning]]) -> None:
    """What findings mean and what to do; those that mean the same in one paragraph."""
    labels: dict[Meaning, list[str]] = {}
    for label, meaning in named:
        labels.setdefault(meaning, []).append(label)
    for meaning, names in labels.items():
        console.print(
            Text.assemble(("; ".join(names), "bold"), f": {meaning.means} ", ("To do: ", "bold"), meaning.remedy)
        )


def _show(console: Console, table: TextTable) -> None:
    shown = Table(table.header[0], title=table.title, title_justify="left")
    for name in table.header[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    if table.rows:
        console.print(shown)
    if table.folded:
        console.print(Text(f"{len(table.folded)} found nothing: {', '.join(table.folded)}"))
    if table.note:
        console.print(table.note if table.rows else f"{table.title}: {table.note}")
