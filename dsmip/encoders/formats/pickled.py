"""Tensors in the zip archives that torch writes, read by an unpickler that imports nothing and runs nothing.

A member `data.pkl` is a pickle, in which every tensor names a member `data/<key>` that has its numbers. The unpickler
knows tensors, plain containers and numbers; whatever else the pickle names becomes an empty object.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from dsmip.errors import UserError, first_line

_PICKLE = "/data.pkl"
_MAX_PICKLE_BYTES = 256 << 20  # a name and a few numbers of each tensor
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Whatever a pickle that is not as it should be makes of the unpickler.
FAULTS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


class StoredTensor(NamedTuple):
    """A tensor of an archive, whose numbers are not read yet (`Archive.read`)."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands for an object of whatever class: it keeps its attributes and does nothing.

    Attributes:
        attributes: Those that the pickle gave to it.
    """

    attributes: Mapping[str, Any]

    def __new__(cls, *_: object, **__: object) -> "Inert":
        inert = super().__new__(cls)
        inert.attributes = {}
        return inert

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def __setitem__(self, key: object, value: object) -> None:
        """Items of a mapping are passed over."""

    def append(self, item: object) -> None:
        """Items of a list are passed over."""

    def extend(self, items: object) -> None:
        """Items of a list are passed over."""

    def add(self, item: object) -> None:
        """Items of a set are passed over."""


class Archive:
    """An open archive.

    Attributes:
        content: What its pickle holds: plain values, `StoredTensor`s, and an `Inert` in place of all else.
        classes: Names of the classes and functions that the pickle names and that are not known here.
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        names = file.namelist()
        self._file, self._root = file, next(name for name in names if name.endswith(_PICKLE)).removesuffix(_PICKLE)
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        if file.getinfo(f"{self._root}{_PICKLE}").file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is too large")
        with file.open(f"{self._root}{_PICKLE}") as data:
            unpickler = _Unpickler(data)
            self.content: Any = unpickler.load()
        self.classes = frozenset(unpickler.classes)

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor; those that share their numbers in the archive share them here.

        Raises:
            ValueError: Its sizes are wrong.
        """
        key, dtype, offset, size, stride = stored
        if offset < 0 or min((*size, *stride), default=0) < 0 or len(size) != len(stride):
            raise ValueError("a tensor with negative sizes")
        if (key, dtype) not in self._storages:
            member = self._file.getinfo(f"{self._root}/data/{key}")
            if member.compress_type != zipfile.ZIP_STORED:  # torch writes none, and a small one may be endless
                raise ValueError(f"{member.filename} is compressed")
            content = bytearray(self._file.read(member))
            self._storages[key, dtype] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0).to(dtype)
        storage = self._storages[key, dtype]
        if math.prod(size) > len(storage):
            raise ValueError("a tensor is larger than its data")
        return torch.as_strided(storage, size, stride, offset)


def has_member(path: Path, suffix: str) -> bool:
    """Whether a file is a zip with a member whose name ends so."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(suffix) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def is_archive(path: Path) -> bool:
    """Whether a file is an archive as torch writes them, by the names of its members."""
    return has_member(path, _PICKLE)


@contextmanager
def opened_archive(path: Path, label: str) -> Iterator[Archive]:
    """An archive for the time of the context.

    Args:
        path: The file.
        label: What it is called in the message.

    Raises:
        UserError: It is damaged, or not made as torch makes them; whatever the context does with it included.
    """
    try:
        with zipfile.ZipFile(path) as file:
            yield Archive(file)
    except FAULTS as error:
        raise UserError(f"{label} cannot be read: {first_line(error)}") from None


class _Rebuild:
    """What a pickle calls for a tensor. No slots: a pickle can put nothing into it."""

    __slots__ = ()

    def __call__(
        self, storage: tuple[str, torch.dtype], offset: int, size: Sequence[int], stride: Sequence[int], *_: object
    ) -> StoredTensor:
        key, dtype = storage
        return StoredTensor(key, dtype, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


class _First:
    """What a pickle calls for a parameter, a typed list or a typed value: it stays as it is."""

    __slots__ = ()

    def __call__(self, value: Any, *_: object) -> Any:
        return value


class _Unpickler(pickle.Unpickler):
    """Never imports anything: a name in the pickle is one of the few below, or stands for an `Inert` object."""

    def __init__(self, data: IO[bytes]) -> None:
        super().__init__(data)
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("torch._utils", "_rebuild_parameter") or module == "torch.jit._pickle":
            return _First()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        self.classes.add(name.rpartition(".")[2])
        return Inert

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        """A storage: ("storage", its type, key, device, number of elements)."""
        _, dtype, key, _, _ = pid
        return str(key), dtype
