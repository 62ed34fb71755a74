"""Links of many mentions as a table: made block by block, so that what was interrupted goes on to an identical file.

<out>               one row for each mention, in their order
.<out>.parts/       while it is made: job.json says of what, block-000000.parquet ... are finished
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsmip.data.records import Mention
from dsmip.errors import UserError
from dsmip.linking.linker import BATCH_SIZE, Linker
from dsmip.linking.links import Links
from dsmip.linking.mentions import Unreadable
from dsmip.progress import Progress, no_progress
from dsmip.storage.atomic import atomic_path, json_text, write_text

BLOCK_ROWS = 8 * BATCH_SIZE  # all batches begin where they would in one go
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("mention_id", pa.string()),
        ("word", pa.string()),
        ("sentence", pa.string()),
        ("reason", pa.string()),
        ("is_nil", pa.bool_()),
        ("known", pa.float64()),
        ("confidence", pa.float64()),
        ("entity_ids", pa.list_(pa.string())),
        ("names", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("experts", pa.list_(pa.string())),
    ]
)
"""`reason`: why a mention could not be linked, null where it was. Lists are best first, `confidence` is the first's."""
_JOB, _KEY = "job.json", b"dsmip_job"

Given = Mapping[str, Any] | Mention | Unreadable


@dataclass(frozen=True)
class BulkOptions:
    """How mentions are linked.

    Attributes:
        top: How many entities each gets.
        min_confidence: As for `Linker.link`.
        candidates: As for `Linker.link`.
        images: The folder that relative paths of pictures start from.
    """

    top: int = 5
    min_confidence: float | None = None
    candidates: int | None = None
    images: Path | None = None


def link_block(linker: Linker, given: Iterable[Given], first_row: int, options: BulkOptions) -> pa.Table:
    """The links of some mentions, a row each; one that cannot be read has a reason."""
    found = linker.link_many(
        given,
        top=options.top,
        min_confidence=options.min_confidence,
        candidates=options.candidates,
        on_error="report",
        images=options.images,
    )
    return pa.Table.from_pylist([_row(links, first_row + number) for number, links in enumerate(found)], SCHEMA)


def _row(links: Links, row: int) -> dict[str, Any]:
    texts = {name: _written(getattr(links.mention, name)) for name in ("mention_id", "word", "sentence")}
    return {
        "row": row,
        **texts,
        "reason": None if links.reason is None else _written(links.reason),
        "is_nil": links.is_nil,
        "known": links.known,
        "confidence": links[0].confidence if links else None,
        "entity_ids": [link.entity_id for link in links],
        "names": [link.name for link in links],
        "scores": [link.score for link in links],
        "experts": [link.expert for link in links],
    }


def _written(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


class LinksFile:
    """A parquet file of links in the making.

    Attributes:
        out: The file.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        """
        Args:
            out: Where it will be.
            job: What it is made of (input, model, options): blocks of another job are not gone on with.

        Raises:
            UserError: It is not to be a parquet file.
        """
        if out.suffix != ".parquet":
            raise UserError(f"--out {out}: links are written as parquet; give a name that ends in .parquet")
        self.out, self._key = out, json_text(dict(job))
        self.parts = out.with_name(f".{out.name}.parts")

    @property
    def is_finished(self) -> bool:
        """Whether it is there already, made by the same job."""
        try:
            metadata = pq.read_schema(self.out).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return bool(metadata.get(_KEY) == self._key.encode())

    def begin(self) -> None:
        """Keeps finished blocks of this job, and deletes those of any other."""
        note = self.parts / _JOB
        if not note.is_file() or note.read_text(encoding="utf-8") != self._key:
            shutil.rmtree(self.parts, ignore_errors=True)
            write_text(note, self._key)

    def block(self, number: int) -> Path:
        """Where a finished block is."""
        return self.parts / f"block-{number:06d}.parquet"

    def write_block(self, number: int, table: pa.Table) -> None:
        """Keeps a block."""
        with atomic_path(self.block(number)) as temporary:
            pq.write_table(table, temporary)

    def finish(self, num_blocks: int) -> None:
        """Puts the blocks together, and deletes them."""
        with atomic_path(self.out) as temporary:
            schema = SCHEMA.with_metadata({_KEY: self._key.encode()})
            with pq.ParquetWriter(temporary, schema) as writer:
                for number in range(num_blocks):
                    writer.write_table(pq.read_table(self.block(number)).replace_schema_metadata(schema.metadata))
        shutil.rmtree(self.parts, ignore_errors=True)


def blocks_of(given: Iterable[Given]) -> Iterator[list[Given]]:
    """The mentions, `BLOCK_ROWS` at a time."""
    iterator = iter(given)
    while block := list(islice(iterator, BLOCK_ROWS)):
        yield block


def link_file(
    linker: Callable[[], Linker],
    given: Iterable[Given],
    file: LinksFile,
    options: BulkOptions,
    total: int,
    progress: Progress = no_progress,
) -> None:
    """Links all mentions into a file, from where an earlier call was interrupted.

    Args:
        linker: opens it, once there is something to link.
        given: the mentions, always in the same order.
        file: where the links go.
        options: how they are linked.
        total: how many mentions there are.
        progress: counts them.
    """
    file.begin()
    opened, done, number = None, 0, -1
    for number, block in enumerate(blocks_of(given)):
        if not file.block(number).is_file():
            opened = opened or linker()
            file.write_block(number, link_block(opened, block, done, options))
        done += len(block)
        progress("mentions linked", done, total)
    file.finish(number + 1)
