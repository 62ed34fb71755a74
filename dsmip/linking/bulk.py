"""Links of many mentions as a table: made block by block, so that what was interrupted goes on to an identical file.

<out>               one row for each mention, in their order
.<out>.parts/       while it is made: job.json says of what, block-000000.parquet ... are finished

Both lie in one folder, here or in an object store.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsmip.data.records import Mention
from dsmip.errors import UserError
from dsmip.linking.linker import BATCH_SIZE, Linker
from dsmip.linking.links import Links
from dsmip.linking.mentions import ImageFolder, Unreadable
from dsmip.parallel import map_alone
from dsmip.storage.atomic import json_text
from dsmip.storage.locations import local_path
from dsmip.storage.nearby_files import NearbyFiles
from dsmip.storage.output_folder import open_output

BLOCK_ROWS = 8 * BATCH_SIZE  # all batches begin where they would in one go
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
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
"""`file`: where a mention is from; `row`: its number among those of all files, from 0; `reason`: why it could not be
linked, null where it was. Lists are best first, `confidence` is the first's."""
_JOB, _KEY, _BLOCK = "job.json", b"dsmip_job", re.compile(r"block-(\d+)\.parquet")

Given = Mapping[str, Any] | Mention | Unreadable


@dataclass(frozen=True)
class BulkOptions:
    """How mentions are linked.

    Attributes:
        top: How many entities each gets.
        min_confidence: As for `Linker.link`.
        candidates: As for `Linker.link`.
    """

    top: int = 5
    min_confidence: float | None = None
    candidates: int | None = None


@dataclass(frozen=True)
class MentionBlock:
    """Mentions that lie one after the other in a file.

    Attributes:
        file: Its name, for the result.
        first_row: Of the first among the mentions of all files.
        mentions: As they were read.
        images: Where names of pictures start.
    """

    file: str
    first_row: int
    mentions: Sequence[Given]
    images: ImageFolder | NearbyFiles = None


def link_block(linker: Linker, block: MentionBlock, options: BulkOptions) -> pa.Table:
    """The links of some mentions, a row each; one that cannot be has a reason.

    On the CPU each batch is linked by one thread, several at once: so the bits are the same on any number of cores, and
    on workers that have a part of a machine.
    """

    def link_batch(start: int) -> list[dict[str, Any]]:
        batch = block.mentions[start : start + BATCH_SIZE]
        images = block.images
        if isinstance(images, NearbyFiles):
            images = images.fetched(_image_names(batch))
        found = linker.link_many(
            batch,
            top=options.top,
            min_confidence=options.min_confidence,
            candidates=options.candidates,
            on_error="report",
            images=images,
        )
        first = block.first_row + start
        return [{"file": block.file, **_row(links, first + number)} for number, links in enumerate(found)]

    rows = map_alone(link_batch, range(0, len(block.mentions), BATCH_SIZE), linker.device)
    return pa.Table.from_pylist([row for each in rows for row in each], SCHEMA)


def _image_names(mentions: Sequence[Given]) -> list[str]:
    images = [each.get("image") for each in mentions if isinstance(each, Mapping)]
    return [image for image in images if isinstance(image, str) and image.strip()]


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
        out: Where it will be.
    """

    def __init__(self, out: str | Path, job: Mapping[str, Any]) -> None:
        """
        Args:
            out: a path, or a URI in an object store.
            job: what it is made of (input, model, options): blocks of another job are not gone on with.

        Raises:
            UserError: it is not to be a parquet file, or a folder is in its place.
        """
        self.out, self._key = out, json_text(dict(job))
        self._folder, self._name = open_output(out)
        if not self._name.endswith(".parquet"):
            raise UserError(f"--out {out}: links are written as parquet; give a name that ends in .parquet")
        here = local_path(out)
        if here is not None and here.is_dir():
            raise UserError(f"--out {out}: is a folder; give the name of a parquet file")
        self._parts = f".{self._name}.parts"

    @property
    def is_finished(self) -> bool:
        """Whether it is there already, made by the same job."""
        stream = self._folder.open(self._name)
        if stream is None:
            return False
        with stream:
            try:
                metadata = pq.read_schema(stream).metadata or {}
            except pa.ArrowException:
                return False
        return bool(metadata.get(_KEY) == self._key.encode())

    def begin(self) -> set[int]:
        """Keeps finished blocks of this job, and deletes those of any other; returns the numbers of those kept."""
        note = f"{self._parts}/{_JOB}"
        if self._folder.read(note) != self._key.encode():
            self._folder.remove(self._parts)
            self._folder.write(note, self._key.encode())
        found = [_BLOCK.fullmatch(name) for name in self._folder.children(self._parts)]
        return {int(each[1]) for each in found if each}

    def write_block(self, number: int, table: pa.Table) -> None:
        """Keeps a block."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        self._folder.write(self._block(number), buffer.getvalue())

    def finish(self, num_blocks: int) -> dict[str, int]:
        """Puts the blocks together, and deletes them; returns how many mentions were linked, were not, and are nil.

        Raises:
            UserError: a block is not there any more.
        """
        counts = {"linked": 0, "unread": 0, "nil": 0}
        with self._folder.made(self._name) as path:
            schema = SCHEMA.with_metadata({_KEY: self._key.encode()})
            with pq.ParquetWriter(path, schema) as writer:
                for number in range(num_blocks):
                    table = self._read_block(number)
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
                    counts["linked"] += table.column("reason").null_count
                    counts["unread"] += len(table) - table.column("reason").null_count
                    counts["nil"] += sum(table.column("is_nil").to_pylist())
        self._folder.remove(self._parts)
        return counts

    def _read_block(self, number: int) -> pa.Table:
        content = self._folder.read(self._block(number))
        if content is None:
            raise UserError(f"{self.out}: a finished block is gone (does another command write it?); run it again")
        return pq.read_table(io.BytesIO(content))

    def _block(self, number: int) -> str:
        return f"{self._parts}/block-{number:06d}.parquet"
