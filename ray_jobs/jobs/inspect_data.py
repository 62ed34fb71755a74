"""The job `dsmip inspect`: what a dataset holds and its flaws, as tables, JSON and a page. Knows no Ray."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from data_prep.inspection.page import write_page
from data_prep.inspection.report import Inspection, inspect_dataset
from data_prep.inspection.tables import tables
from dsmip.data.dataset import Dataset
from dsmip.storage.atomic import write_json
from ray_jobs.terminal.display import Display


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
    for table in tables(found):
        shown = Table(table.header[0], title=table.title, title_justify="left")
        for name in table.header[1:]:
            shown.add_column(name, justify="right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(Text, row))
        if table.rows:
            console.print(shown)
        if table.note:
            console.print(table.note if table.rows else f"{table.title}: {table.note}")
    console.print(f"page: {html}" if html else "give --html FILE for a page with samples and examples")
    return found
