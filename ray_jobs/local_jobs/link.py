"""The job `dsmip link`: links of one mention as a small table, or of a file of mentions as another file. No Ray."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from data_prep.formats.json_records import BrokenLine, line_records
from dsmip.errors import UserError
from dsmip.linking.bulk import BulkOptions, LinksFile, link_file
from dsmip.linking.linker import Linker
from dsmip.linking.links import Links
from dsmip.linking.load import LoadOptions, load_linker
from dsmip.linking.mentions import Unreadable
from dsmip.rank_options import device_here
from dsmip.storage.atomic import sha256_file, write_masked_json
from dsmip.storage.locations import Location
from dsmip.version import VERSION
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import complain, result_console, say

_STDOUT = Path("-")
_BATCH_ROWS = 256


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

    def opened(self, display: Display, notice: Callable[[str], None]) -> Linker:
        """The linker; its index is built first, where it is missing."""
        return load_linker(self.location, device_here(self.device), self.options, progress=display, notice=notice)


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


def link_mentions(model: LinkModel, source: Path, out: Path, options: BulkOptions, display: Display) -> None:
    """Links a file of mentions; every one of them has a row in `out`.

    Args:
        model: What is linked with.
        source: A .jsonl or .parquet of word, sentence, image (a path, relative to the file) and mention_id.
        out: The parquet file to write.
        options: How they are linked.
        display: Shows progress.

    Raises:
        UserError: For files or a model that cannot be used.
    """
    read, total = _reader(source)
    linker = model.opened(display, display.say)
    asked = {name: value for name, value in asdict(options).items() if name != "images"}
    job = {"model": linker.model.identity, "input": sha256_file(source), "version": VERSION, **asked}
    file = LinksFile(out, job)
    if file.is_finished:
        display.say(f"{out}: is complete already")
        return
    display.interrupted = lambda: "interrupted; what is linked is kept: run the same command again to go on"
    with display:
        link_file(lambda: linker, read(), file, options, total, display)
    display.say(_summary(out))


def _summary(out: Path) -> str:
    table = pq.read_table(out, columns=["reason", "is_nil"])
    unread = len(table) - table.column("reason").null_count
    nil = sum(table.column("is_nil").to_pylist())
    text = f"{out}: {len(table)} mentions, {len(table) - unread} linked"
    if unread:
        text += f", {unread} that could not be (see the column reason)"
    return text + (f"; {nil} of something that is not in the knowledge base" if nil else "")


def _reader(source: Path) -> tuple[Callable[[], Iterator[Any]], int]:
    """What reads the mentions of a file from its start, and how many there are."""
    if source.suffix == ".jsonl":
        return lambda: _lines(source), sum(1 for _ in line_records(source))
    if source.suffix != ".parquet":
        raise UserError(f"{source}: mentions are read from .jsonl or .parquet")
    try:
        return lambda: _rows(source), pq.read_metadata(source).num_rows
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: cannot be read as parquet: {error}") from None


def _lines(source: Path) -> Iterator[Any]:
    for record in line_records(source):
        yield Unreadable(f"wrong JSON: {record.problem}") if isinstance(record, BrokenLine) else record


def _rows(source: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(source) as table:
            for batch in table.iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: cannot be read as parquet: {error}") from None
