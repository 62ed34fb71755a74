"""A table file written batch by batch: memory holds one batch and 16 bytes per item, however long the table.

Columns go to files of their own beside the target, which are joined at the end into the safetensors file that
`Table.load` opens: eight bytes of header length, the header (JSON), the tensors' bytes one after the other.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.storage.atomic import atomic_path, naming_full_disk

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}
_ALIGNED = 8  # bytes of the largest number
_NONE: Mapping[str, Tensor] = MappingProxyType({})


class TableWriter:
    """Use as a context manager; the file appears, whole, when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: dict[str, _Stream] = {}
        self._token_rows: dict[str, _TokenRows] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(dir=self._path.parent, prefix=f".{self._path.name}.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming_full_disk(self._path.parent), self._folder:
            if kind is None:
                self._finish()
            for stream in self._streams.values():
                stream.file.close()

    def append(self, table: Table, alike: Mapping[str, Tensor] = _NONE) -> None:
        """Adds rows (CPU tensors); every table must have the same columns.

        Args:
            alike: By the name of a ragged column, which items (bool [N]) have the very same token rows, here and in all
                other tables: these are stored once.
        """
        with naming_full_disk(self._path.parent):
            for name, column in table.columns.items():
                if not isinstance(column, Ragged):
                    self._stream(name).write(table.dense(name))
                    continue
                alike_N = alike.get(name, torch.zeros(len(column.lengths), dtype=torch.bool))
                self._write_tokens(name, column, alike_N)

    def _write_tokens(self, name: str, column: Ragged, alike_N: Tensor) -> None:
        stream, rows = self._stream(f"{name}/values"), self._token_rows.setdefault(name, _TokenRows())
        own = column.rows(~alike_N).compact()
        starts_N = torch.full_like(column.starts, _TokenRows.SHARED)
        starts_N[~alike_N] = own.starts + stream.num_rows
        stream.write(own.values)
        rows.starts.append(starts_N)
        rows.lengths.append(column.lengths)
        if rows.shared is None and bool(alike_N.any()):
            rows.shared = column.rows(alike_N.nonzero()[:1, 0]).compact().values

    def _stream(self, name: str) -> "_Stream":
        if name not in self._streams:
            self._streams[name] = _Stream((Path(self._folder.name) / str(len(self._streams))).open("w+b"))
        return self._streams[name]

    def _finish(self) -> None:
        for name, rows in self._token_rows.items():
            values = self._stream(f"{name}/values")
            starts_N = torch.cat(rows.starts)
            starts_N[starts_N == _TokenRows.SHARED] = values.num_rows
            self._stream(f"{name}/starts").write(starts_N)
            self._stream(f"{name}/lengths").write(torch.cat(rows.lengths))
            if rows.shared is not None:
                values.write(rows.shared)
        # large numbers first, so that every tensor starts at a multiple of its numbers' size
        streams = sorted(self._streams.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header: dict[str, object] = {"__metadata__": {"table": "{}"}}
        end = 0
        for name, stream in streams:
            begin, end = end, end + stream.file.tell()
            header[name] = {"dtype": _DTYPES[stream.dtype], "shape": stream.shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNED)
        with atomic_path(self._path) as temporary, temporary.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for _, stream in streams:
                stream.file.seek(0)
                shutil.copyfileobj(stream.file, target, 1 << 24)


class _Stream:
    """The rows of one tensor."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.num_rows = file, 0
        self.dtype, self._row_shape = torch.float32, torch.Size()

    def write(self, rows: Tensor) -> None:
        self.dtype, self._row_shape = rows.dtype, rows.shape[1:]
        self.num_rows += len(rows)
        self.file.write(rows.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    @property
    def shape(self) -> list[int]:
        return [self.num_rows, *self._row_shape]


class _TokenRows:
    """Where the token rows of a ragged column's items are. shared: the rows of all items that are alike."""

    SHARED = -1

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.shared: Tensor | None = None
