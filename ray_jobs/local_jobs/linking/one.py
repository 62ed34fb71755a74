"""Links of one mention as a small table or JSON, and the model that links."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from dsmip.linking.bulk import BulkOptions
from dsmip.linking.linker import Linker
from dsmip.linking.links import Links
from dsmip.linking.load import LoadOptions, load_linker
from dsmip.progress import Progress
from dsmip.rank_options import device_here
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import Location
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import complain, result_console, say

_STDOUT = Path("-")


@dataclass(frozen=True)
class LinkModel:
    """What is linked with.

    Attributes:
        location: Of the run or bundle.
        device: Its name.
        options: Which model of it.
    """

    location: Location
    device: str
    options: LoadOptions

    def opened(self, progress: Progress, notice: Callable[[str], None]) -> Linker:
        """The linker; its index is built first, where it is missing."""
        return load_linker(self.location, device_here(self.device), self.options, progress=progress, notice=notice)


def link_one(
    model: LinkModel, mention: dict[str, str | None], options: BulkOptions, json_file: Path | None = None
) -> Links:
    """Links one mention and prints its links.

    Args:
        mention: Its word, sentence and image.
        json_file: Where to write them as JSON as well; `-`: on stdout, instead of the table.

    Raises:
        UserError: For a mention or a model that cannot be used.
    """
    with Display(transient=True) as display:
        linker = model.opened(display, complain)
    links = linker.link(
        mention["word"] or "",
        mention["sentence"] or "",
        mention["image"],
        top=options.top,
        min_confidence=options.min_confidence,
        candidates=options.candidates,
    )
    if json_file == _STDOUT:
        say(json.dumps(links.as_dict(), indent=2, ensure_ascii=False))
        return links
    _show(links)
    if json_file is not None:
        write_masked_json(json_file, links.as_dict())
    return links


def _show(links: Links) -> None:
    """Columns that nothing is in are left out."""
    table = Table("", "entity", "name", "score", box=None, pad_edge=False)
    has_expert = any(link.expert for link in links)
    sure = links[0].confidence if links else None
    for there, title in ((has_expert, "expert"), (sure is not None, "confidence")):
        if there:
            table.add_column(title)
    for number, link in enumerate(links, start=1):
        cells = [f"{number}", link.entity_id, link.name, f"{link.score:.4f}"]
        if has_expert:
            cells.append(link.expert or "")
        if sure is not None:
            cells.append("" if link.confidence is None else f"{link.confidence:.0%}")
        table.add_row(*cells)
    result_console().print(table)
    if links.is_nil:
        say(f"not in the knowledge base, most likely: it is with a probability of {links.known:.0%}")
