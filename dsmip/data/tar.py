"""WebDataset tars: samples of one key each, written reproducibly, read with suspicion.

A sample is a key without dots and its fields (`json`, `jpg`, `entity.0.jpg` ...), stored next to each other as
`<key>.<field>`. Fields are bytes here; no field is ever decoded by its name, so no pickle is loaded and no URL opened.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsmip.errors import UserError
from dsmip.storage.atomic import atomic_path

Fields = Mapping[str, bytes]

MAX_FIELD_BYTES = 1 << 26
_COPY_BYTES = 1 << 24
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NAME = re.compile(rf"({_KEY.pattern})\.([a-z0-9]+(?:\.[a-z0-9]+)*)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: its position in the shard, its key, its fields."""

    index: int
    key: str
    fields: Fields


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What a shard became: sizes, digest, and for each sample where its fields' bytes lie: field -> (offset, size).

    Attributes:
        end: Where the samples end and what closes the tar begins.
    """

    samples: int
    bytes: int
    sha256: str
    end: int
    spans: tuple[Mapping[str, tuple[int, int]], ...]


def write_shard(path: Path, samples: Iterable[tuple[str, Fields]]) -> WrittenShard:
    """Writes (key, fields) pairs as a tar, atomically; equal samples give equal bytes (fixed owner, mode and time)."""
    spans = []
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        writer = _HashingWriter(stream)
        for key, fields in samples:
            spans.append(_write_sample(writer, key, fields))
        end = writer.offset
        writer.close()
    return WrittenShard(len(spans), writer.offset, writer.digest.hexdigest(), end, tuple(spans))


def join_shards(path: Path, files: Iterable[tuple[Path, int]]) -> tuple[int, str]:
    """Writes the samples of several tars (file, `WrittenShard.end`) one after the other; its bytes and SHA-256."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        writer = _HashingWriter(stream)
        for file, end in files:
            with file.open("rb") as source:
                for start in range(0, end, _COPY_BYTES):
                    writer.write(source.read(min(_COPY_BYTES, end - start)))
        writer.close()
    return writer.offset, writer.digest.hexdigest()


def read_shard(path: Path, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Sample]:
    """The samples of a tar whose index is `wanted`, in order; the bytes of the others are skipped over.

    Raises:
        UserError: the file is missing, damaged, or holds anything but sample fields.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{path}: the shard is missing; prepare the dataset again") from error
    with stream:
        yield from read_samples(stream, str(path), wanted)


def read_samples(
    stream: BinaryIO, address: str, wanted: Callable[[int], bool], only: Container[str] | None = None
) -> Iterator[Sample]:
    """The same of an open tar.

    Args:
        stream: the tar.
        address: its name for messages.
        wanted: says by its index whether a sample is read.
        only: the fields that are read of it (default: all).
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            yield from _read_samples(archive, wanted, only)
    except (tarfile.TarError, _BadShard, EOFError) as error:
        raise UserError(f"{address}: the shard is damaged ({error}); prepare the dataset again") from error


def read_span(stream: BinaryIO, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset` of an open shard.

    Raises:
        UserError: they are outside the file.
    """
    if not (offset >= 0 and 0 <= size <= MAX_FIELD_BYTES):
        raise UserError(f"{stream.name}: no picture at {offset} + {size}; prepare the dataset again")
    stream.seek(offset)
    content = stream.read(size)
    if len(content) != size:
        raise UserError(f"{stream.name}: the shard ends before {offset + size}; prepare the dataset again")
    return content


def json_field(value: Any) -> bytes:
    """A JSON field: sorted keys, UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def tar_header(name: str, size: int) -> bytes:
    """What `TarInfo.tobuf` makes of a plain file of mode 644, ten times faster: a dataset has hundreds of thousands.

    Raises:
        ValueError: A name of more than 100 characters, or a size above 8 GiB.
    """
    encoded = name.encode("ascii")
    if len(encoded) > tarfile.LENGTH_NAME or size >= 8**11:
        raise ValueError(f"no header for {name} of {size} bytes")
    header = bytearray(_EMPTY_HEADER)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _empty_header() -> bytes:
    """Of a file without name and size; spaces where the check sum goes, as they count in it."""
    info = tarfile.TarInfo("")
    info.mode = 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii")
    return header[:148] + b" " * 8 + header[156:]


_EMPTY_HEADER = _empty_header()


class _BadShard(Exception):
    pass


class _HashingWriter:
    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.offset, self.digest = stream, 0, hashlib.sha256()

    def write(self, content: bytes) -> None:
        self.stream.write(content)
        self.digest.update(content)
        self.offset += len(content)

    def close(self) -> None:
        """What ends a tar: two empty blocks, and zeros up to a whole record."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self.offset % tarfile.RECORDSIZE))


def _write_sample(writer: _HashingWriter, key: str, fields: Fields) -> dict[str, tuple[int, int]]:
    spans, blocks, offset = {}, list[bytes](), writer.offset
    for field in sorted(fields):
        name, content = f"{key}.{field}", fields[field]
        if not (_KEY.fullmatch(key) and _NAME.fullmatch(name)):
            raise ValueError(f"not a sample's field: key {key!r}, field {field!r}")
        offset += tarfile.BLOCKSIZE
        spans[field] = (offset, len(content))
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        blocks += [tar_header(name, len(content)), content, padding]
        offset += len(content) + len(padding)
    writer.write(b"".join(blocks))
    return spans


def _read_samples(
    archive: tarfile.TarFile, wanted: Callable[[int], bool], only: Container[str] | None
) -> Iterator[Sample]:
    index, key, fields = -1, "", dict[str, bytes]()
    keep = False
    for member in archive:
        match = _NAME.fullmatch(member.name)
        if match is None or not member.isreg() or member.issparse():
            raise _BadShard(f"unexpected member {member.name!r}")
        if match[1] != key:
            if keep:
                yield Sample(index, key, fields)
            index, key, fields = index + 1, match[1], {}
            keep = wanted(index)
        if keep and (only is None or match[2] in only):
            fields[match[2]] = _content(archive, member)
    if keep:
        yield Sample(index, key, fields)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_FIELD_BYTES:
        raise _BadShard(f"member {member.name!r} has {member.size} bytes")
    stream = archive.extractfile(member)
    try:
        content = stream.read() if stream else b""
    except tarfile.ReadError:  # the file ends inside it
        content = b""
    if len(content) != member.size:
        raise _BadShard(f"member {member.name!r} is cut short")
    return content
