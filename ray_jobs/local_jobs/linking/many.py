"""Files of mentions linked into one file of links: what is to be done, and the doing of it in this process."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from dsmip.errors import UserError
from dsmip.linking.bulk import BulkOptions, LinksFile, link_block
from dsmip.linking.linker import Linker
from dsmip.version import VERSION
from ray_jobs.local_jobs.linking.one import LinkModel
from ray_jobs.local_jobs.linking.sources import Block, BlockReader, find_files, plan_blocks
from ray_jobs.terminal.display import Display

NAME = "mentions linked"


@dataclass(frozen=True)
class BulkWork:
    """What every block is linked with.

    Attributes:
        model: Whoever links opens it.
        identity: The model's when the command began.
        options: How mentions are linked.
    """

    model: LinkModel
    identity: str
    options: BulkOptions


class BlockLinker:
    """Links blocks, one after the other."""

    def __init__(self, work: BulkWork, linker: Linker) -> None:
        """
        Raises:
            UserError: it is another model than when the command began.
        """
        if linker.model.identity != work.identity:
            raise UserError(f"{work.model.location}: the model was changed meanwhile; run the command again")
        self._linker, self._options, self._reader = linker, work.options, BlockReader()

    def __call__(self, block: Block) -> pa.Table:
        """The links of a block, a row for each mention."""
        return link_block(self._linker, self._reader.read(block), self._options)


@dataclass(frozen=True)
class BulkJob:
    """A file of links that is to be made, or to be gone on with.

    Attributes:
        work: What it is made with.
        file: The file.
        blocks: All of it.
        missing: Blocks that are not there yet.
    """

    work: BulkWork
    file: LinksFile
    blocks: Sequence[Block]
    missing: Sequence[Block]

    @property
    def total(self) -> int:
        """How many mentions there are."""
        return sum(block.num_rows for block in self.blocks)

    @property
    def done(self) -> int:
        """How many of them were linked when it was planned."""
        return self.total - sum(block.num_rows for block in self.missing)

    def finish(self, display: Display) -> None:
        """Puts the file together, and says what is in it."""
        counts = self.file.finish(len(self.blocks))
        text = f"{self.file.out}: {self.total} mentions, {counts['linked']} linked"
        if counts["unread"]:
            text += f", {counts['unread']} that could not be (see the column reason)"
        nil = f"; {counts['nil']} of something that is not in the knowledge base" if counts["nil"] else ""
        display.say(text + nil)


def plan_links(
    model: LinkModel, source: str | Path, out: str | Path, options: BulkOptions, display: Display
) -> tuple[BulkJob, Linker] | None:
    """What is to be done, and the model, opened in this process; None: all of it is done.

    Args:
        model: What is linked with.
        source: A .jsonl or .parquet of word, sentence, image (a path, relative to the file) and mention_id; a folder or
            a pattern of such files; here or in an object store.
        out: The parquet file to write, here or in an object store.
        options: How they are linked.
        display: Shows progress; at an interruption it says how to go on.

    Raises:
        UserError: For files or a model that cannot be used.
    """
    files = find_files(source)
    blocks = plan_blocks(files)
    linker = model.opened(display, display.say)
    inputs = [[file.name, file.version] for file in files]
    identity = linker.model.identity
    file = LinksFile(out, {"model": identity, "input": inputs, "version": VERSION, **asdict(options)})
    if file.is_finished:
        display.say(f"{out}: is complete already")
        return None
    there = file.begin()
    missing = [block for block in blocks if block.number not in there]
    if there:
        display.say(f"  {len(there)} of {len(blocks)} blocks of mentions are there already")
    display.interrupted = lambda: "interrupted; what is linked is kept: run the same command again to go on"
    return BulkJob(BulkWork(model, identity, options), file, blocks, missing), linker


def link_mentions(
    model: LinkModel, source: str | Path, out: str | Path, options: BulkOptions, display: Display
) -> None:
    """Links files of mentions in this process; every mention has a row in `out`. For arguments see `plan_links`."""
    planned = plan_links(model, source, out, options, display)
    if planned is None:
        return
    job, linker = planned
    link, done = BlockLinker(job.work, linker), job.done
    with display:
        display(NAME, done, job.total)
        for block in job.missing:
            job.file.write_block(block.number, link(block))
            done += block.num_rows
            display(NAME, done, job.total)
    job.finish(display)
