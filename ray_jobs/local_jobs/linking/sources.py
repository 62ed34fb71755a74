"""Files of mentions: which a location stands for, the blocks that they are linked in, and the reading of a block."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.formats.json_records import BrokenLine, numbered_stream, record_places
from dsmip.data.manifest import MAX_FILE_BYTES
from dsmip.errors import UserError, first_line
from dsmip.linking import bulk
from dsmip.linking.bulk import MentionBlock
from dsmip.linking.mentions import MENTION_FIELDS, Unreadable
from dsmip.storage.atomic import sha256_file
from dsmip.storage.locations import local_path
from dsmip.storage.nearby_files import NearbyFiles
from dsmip.storage.object_store import ObjectStore, attempt

Result = TypeVar("Result")

_SUFFIXES = (".jsonl", ".parquet")
_CHANGED = "was changed while its mentions were linked; run the command again"
_BATCH_ROWS = 256


@dataclass(frozen=True)
class MentionFile:
    """A file of mentions.

    Attributes:
        location: An absolute path, or a URI.
        name: Below what was given.
        version: Differs when the content does.
    """

    location: str
    name: str
    version: str

    def open(self) -> BinaryIO:
        """The file, open for reading."""
        path = local_path(self.location)
        if path is not None:
            return path.open("rb")
        folder, name = _split(self.location)
        return ObjectStore(folder).open(name)

    @property
    def images(self) -> Path | NearbyFiles:
        """Where names of pictures start: the file's own folder."""
        path = local_path(self.location)
        return NearbyFiles(_split(self.location)[0], MAX_FILE_BYTES) if path is None else path.parent


@dataclass(frozen=True)
class Block:
    """Mentions that are linked together.

    Attributes:
        number: Of the block, over all files.
        file: The one that they are all in.
        first_row: Of the first mention among those of all files.
        num_rows: How many there are.
        start: Where they begin in the file: a row of parquet, a byte of lines.
        stop: The first byte behind them, of lines.
        line: The number of the first one's line.
    """

    number: int
    file: MentionFile
    first_row: int
    num_rows: int
    start: int
    stop: int = 0
    line: int = 1


def find_files(source: str | Path) -> list[MentionFile]:
    """The files that a user means, in order: a file, those of a folder, or those that match a pattern.

    Args:
        source: A path or URI; patterns may have * and [], and ** for folders below.

    Raises:
        UserError: There is none, or one is neither .jsonl nor .parquet.
    """
    path = local_path(source)
    found = _in_store(str(source)) if path is None else _here(path)
    if not found:
        raise UserError(f"{source}: no such file of mentions, nor a folder or pattern of some ({', '.join(_SUFFIXES)})")
    for each in found:
        if not each.location.endswith(_SUFFIXES):
            raise UserError(f"{each.location}: mentions are read from .jsonl or .parquet")
    return found


def _here(path: Path) -> list[MentionFile]:
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, [each for each in sorted(path.iterdir()) if each.suffix in _SUFFIXES and each.is_file()]
    else:
        root = Path(_fixed(str(path)) or ".")
        files = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
    try:
        hashes = [sha256_file(each) for each in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    names = [each.relative_to(root).as_posix() for each in files]
    return [MentionFile(str(files[n].absolute()), names[n], hashes[n]) for n in range(len(files))]


def _in_store(uri: str) -> list[MentionFile]:
    if glob.has_magic(uri):
        root = _fixed(uri)
        store = ObjectStore(root)
        names = store.glob(uri[len(root) + 1 :])
    elif uri.endswith(_SUFFIXES):
        root, name = _split(uri)
        store, names = ObjectStore(root), [name]
    else:
        root = uri.rstrip("/")
        store = ObjectStore(root)
        names = [each for each in store.children("") if each.endswith(_SUFFIXES)]
    found = []
    try:
        for name in names:
            if stored := store.objects(name).get(name):
                found.append(MentionFile(store.address(name), name, stored.version))
    except FileNotFoundError:
        raise UserError(f"{uri}: there is no such bucket") from None
    return found


def _fixed(pattern: str) -> str:
    """The folder above a pattern's first changing name."""
    parts = pattern.split("/")
    changing = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:changing])


def _split(uri: str) -> tuple[str, str]:
    folder, _, name = uri.rpartition("/")
    return folder, name


def plan_blocks(files: list[MentionFile]) -> list[Block]:
    """The blocks of all files, in order; none spans two files.

    Raises:
        UserError: One cannot be read.
    """
    blocks: list[Block] = []
    row = 0
    for file in files:
        plan = _of_parquet if file.location.endswith(".parquet") else _of_lines
        for start, stop, line, num_rows in _reading(file, plan):
            blocks.append(Block(len(blocks), file, row, num_rows, start, stop, line))
            row += num_rows
    return blocks


def _of_parquet(stream: BinaryIO) -> list[tuple[int, int, int, int]]:
    """Start, end, line and length of each block."""
    total = pq.read_metadata(stream).num_rows
    return [(start, 0, 1, min(bulk.BLOCK_ROWS, total - start)) for start in range(0, total, bulk.BLOCK_ROWS)]


def _of_lines(stream: BinaryIO) -> list[tuple[int, int, int, int]]:
    firsts: list[tuple[int, int]] = []
    total = 0
    for total, place in enumerate(record_places(stream), start=1):
        if (total - 1) % bulk.BLOCK_ROWS == 0:
            firsts.append(place)
    ends = [start for start, _ in firsts[1:]] + [stream.seek(0, 2)]
    rows = [bulk.BLOCK_ROWS] * (len(firsts) - 1) + [total - bulk.BLOCK_ROWS * (len(firsts) - 1)]
    return [(start, stop, line, n) for (start, line), stop, n in zip(firsts, ends, rows, strict=False)]


class BlockReader:
    """Reads blocks. After a block of parquet, a later one of the same file is read on from there."""

    def __init__(self) -> None:
        self._rows: _Rows | None = None

    def read(self, block: Block) -> MentionBlock:
        """The mentions of a block.

        Raises:
            UserError: the file cannot be read, or was changed.
            StoreAway: its store cannot be reached.
        """
        if block.file.location.endswith(".parquet"):
            mentions = self._of_parquet(block)
        else:
            mentions = _reading(block.file, lambda stream: _lines(stream, block))
        if len(mentions) != block.num_rows:
            raise UserError(f"{block.file.location}: {_CHANGED}")
        return MentionBlock(block.file.name, block.first_row, mentions, block.file.images)

    def _of_parquet(self, block: Block) -> list[Any]:
        rows, self._rows = self._rows, None  # after an error it is opened anew
        if rows is None or rows.file != block.file or rows.row > block.start:
            rows = _tried(block.file, lambda: _Rows(block.file, block.start))
        mentions = _tried(block.file, lambda: rows.take(block.start, block.num_rows))
        self._rows = rows
        return mentions


class _Rows:
    """The rows of a file of parquet, read from where one of its groups begins."""

    def __init__(self, file: MentionFile, start: int) -> None:
        self.file, self.row = file, 0
        table = pq.ParquetFile(file.open())
        group, groups = 0, table.num_row_groups
        while group < groups - 1 and self.row + table.metadata.row_group(group).num_rows <= start:
            self.row += table.metadata.row_group(group).num_rows
            group += 1
        columns = [name for name in table.schema_arrow.names if name in MENTION_FIELDS]
        self._batches = table.iter_batches(_BATCH_ROWS, row_groups=range(group, groups), columns=columns)
        self._batch = pa.RecordBatch.from_pylist([])

    def take(self, start: int, count: int) -> list[Any]:
        """Rows start .. start + count, or fewer at the end of the file."""
        found: list[Any] = []
        while len(found) < count:
            skipped = start + len(found) - self.row
            if skipped < self._batch.num_rows:
                found += self._batch.slice(skipped, count - len(found)).to_pylist()
                continue
            self.row += self._batch.num_rows
            batch = next(self._batches, None)
            if batch is None:
                break
            self._batch = batch
        return found


def _lines(stream: BinaryIO, block: Block) -> list[Any]:
    stream.seek(block.start)
    records = numbered_stream(BytesIO(stream.read(block.stop - block.start)), block.line)
    return [Unreadable(f"wrong JSON: {each.problem}") if isinstance(each, BrokenLine) else each for _, each in records]


def _reading(file: MentionFile, work: Callable[[BinaryIO], Result]) -> Result:
    def opened() -> Result:
        with file.open() as stream:
            return work(stream)

    return _tried(file, opened)


def _tried(file: MentionFile, call: Callable[[], Result]) -> Result:
    """Calls; a store that does not answer is asked again."""

    def readable() -> Result:
        try:
            return call()
        except pa.ArrowException as error:
            raise UserError(f"{file.location}: cannot be read as parquet: {first_line(error)}") from None

    try:
        return readable() if local_path(file.location) else attempt(file.location, readable)
    except FileNotFoundError:
        raise UserError(f"{file.location}: {_CHANGED}") from None
    except OSError as error:
        raise UserError(f"{file.location}: cannot be read: {error.strerror or error}") from None
