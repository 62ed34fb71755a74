"""Records of large JSON files, one at a time: memory holds a record, not the file.

The standard library's decoder reads each record, so that texts come as they are (faster streaming parsers replace
lone surrogates, which must be seen to be refused). NaN, which is no JSON but what tools write for "nothing", is null.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dsmip.errors import UserError

CHUNK = 1 << 20
MAX_RECORD = 1 << 26  # characters; of a file of lines, bytes
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))


def array_records(path: Path) -> Iterator[Any]:
    """The elements of a file that is one JSON array.

    Raises:
        UserError: The file is missing, no UTF-8, no array or wrong JSON; names line and column.
    """
    with _Text(path) as text:
        text.expect_opening("[", "array")
        while not text.closes("]"):
            yield text.value()


def object_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a file that is one JSON object.

    Raises:
        UserError: The file is missing, no UTF-8, no object or wrong JSON; names line and column.
    """
    with _Text(path) as text:
        text.expect_opening("{", "object")
        while not text.closes("}"):
            key = text.key()
            yield key, text.value()


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that is no JSON value; `problem` names line and column."""

    problem: str


def line_records(path: Path) -> Iterator[Any]:
    """The records of a file of one JSON value a line; a line that cannot be read comes as a `BrokenLine`.

    Empty lines do not count.

    Raises:
        UserError: The file cannot be read.
    """
    return (record for _, record in numbered_records(path))


def numbered_records(path: Path) -> Iterator[tuple[int, Any]]:
    """As `line_records`, each with the number of its line.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            yield from numbered_stream(stream)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def numbered_stream(stream: BinaryIO, first_line: int = 1) -> Iterator[tuple[int, Any]]:
    """As `numbered_records`, of a stream whose first line has that number in its file."""
    for number, (line, _) in enumerate(_lines(stream), start=first_line):
        if line.strip(_SPACE.encode()):
            yield number, _line_value(line, number)


def record_places(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where the line of each record of `line_records` begins: its first byte, and its number."""
    start = 0
    for number, (line, num_bytes) in enumerate(_lines(stream), start=1):
        if line.strip(_SPACE.encode()):
            yield start, number
        start += num_bytes


def _lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines and their lengths. Of one longer than the longest record, its beginning, a byte more than that."""
    while line := stream.readline(MAX_RECORD + 1):
        rest, num_bytes = line, len(line)
        while len(rest) > MAX_RECORD and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_RECORD + 1)
            num_bytes += len(rest)
        yield line, num_bytes


def _line_value(line: bytes, number: int) -> Any:
    if len(line) > MAX_RECORD:
        return BrokenLine(f"line {number}: longer than {MAX_RECORD} bytes")
    try:
        return _DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BrokenLine(f"line {number} column {error.start + 1}: not UTF-8 text")
    except json.JSONDecodeError as error:
        return BrokenLine(f"line {number} column {error.colno}: {error.msg}")
    except ValueError:
        return BrokenLine(f"line {number}: a number of too many digits")
    except RecursionError:
        return BrokenLine(f"line {number}: nested too deeply")


def opening(path: Path) -> str:
    """The first character of a JSON file that is no space ("" if none): says what its value is, without reading on."""
    with _Text(path) as text:
        return text.peek()


class _Text:
    """A window of a JSON file that moves on from value to value."""

    def __init__(self, path: Path) -> None:
        self._path, self._buffer, self._at, self._complete = path, "", 0, False
        self._line, self._column = 1, 0  # of the buffer's first character: lines and characters before it
        self._first = True

    def __enter__(self) -> "_Text":
        try:
            self._stream = self._path.open(encoding="utf-8-sig", newline="")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _SPACE:
                    return self._buffer[self._at]
                self._at += 1
            if not self._read_on(CHUNK):
                return ""

    def expect_opening(self, bracket: str, kind: str) -> None:
        """Steps over the opening bracket."""
        found = self.peek()
        if found != bracket:
            names = {"[": "an array", "{": "an object", "": "nothing"}
            raise UserError(
                f"{self._path}: expected a JSON {kind} of records, found {names.get(found, 'something else')}"
            )
        self._at += 1

    def closes(self, bracket: str) -> bool:
        """Steps over the comma before the next value, or over the closing bracket: True."""
        found = self.peek()
        if found == bracket:
            self._at += 1
            if self.peek():
                self._refuse("extra data", self._at)
            return True
        if not self._first:
            if found != ",":
                self._refuse(f"expected ',' or '{bracket}'", self._at)
            self._at += 1
        self._first = False
        return False

    def key(self) -> str:
        """An object's key and its colon."""
        if self.peek() != '"':
            self._refuse("expected a key in double quotes", self._at)
        key: str = self.value()
        if self.peek() != ":":
            self._refuse("expected ':'", self._at)
        self._at += 1
        return key

    def value(self) -> Any:
        """The next value, whatever it is; the buffer grows while it may be cut short."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                if len(self._buffer) - self._at > MAX_RECORD or not self._read_on(len(self._buffer)):
                    self._refuse(error.msg, self._at + ahead)
                continue
            except RecursionError as error:
                raise UserError(f"{self._path}: line {self._line}: nested too deeply") from error
            except ValueError as error:
                raise UserError(f"{self._path}: line {self._line}: a number of too many digits") from error
            # A number at the buffer's end may go on, with "." or "e+" in between.
            length, left = end - self._at, len(self._buffer) - end
            if isinstance(value, int | float) and left < 3 and self._read_on(CHUNK):
                continue
            self._at += length
            return value

    def _read_on(self, count: int) -> bool:
        """Drops what is done and reads more; False at the file's end."""
        if self._complete:
            return False
        done, lines = self._buffer[: self._at], self._buffer.count("\n", 0, self._at)
        self._column = len(done) - done.rfind("\n") - 1 if lines else self._column + len(done)
        self._line += lines
        try:
            more = self._stream.read(max(count, CHUNK))
        except UnicodeDecodeError:
            _refuse_bytes(self._path)
        self._buffer, self._at, self._complete = self._buffer[self._at :] + more, 0, not more
        return bool(more)

    def _refuse(self, problem: str, position: int) -> NoReturn:
        lines = self._buffer.count("\n", 0, position)
        column = position - self._buffer.rfind("\n", 0, position) if lines else self._column + position + 1
        raise UserError(f"{self._path}: line {self._line + lines} column {column}: wrong JSON: {problem}")


def _refuse_bytes(path: Path) -> NoReturn:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number} column {error.start + 1}: not UTF-8 text") from error
    raise UserError(f"{path}: not UTF-8 text")
