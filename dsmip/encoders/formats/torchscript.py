"""Tensors of a TorchScript archive, as OpenAI published CLIP: a program with its weights, of which nothing is run.

An archive is a zip. `data.pkl` is a pickle of the module, in which every tensor names a member `data/<key>` that has
its numbers. The pickle is read by an unpickler that knows tensors and lists of numbers; whatever else it names becomes
an empty object with attributes.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dsmip.errors import UserError, first_line

_CONSTANTS = "/constants.pkl"  # only a TorchScript archive has it
_MAX_OBJECTS, _MAX_DEPTH = 200_000, 100
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
_FAULTS = (
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


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive holds.

    Attributes:
        tensors: By the names that they have in the module's state dict; attention masks, which are no weights, are
            left out.
        classes: Names of the classes of its modules.
    """

    tensors: dict[str, Tensor]
    classes: frozenset[str]


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by the names of its members."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(_CONSTANTS) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_archive(path: Path) -> Archive:
    """The tensors of a TorchScript archive.

    Raises:
        UserError: It is damaged, or not made as TorchScript makes them.
    """
    try:
        with zipfile.ZipFile(path) as file:
            root = next(name for name in file.namelist() if name.endswith(_CONSTANTS)).removesuffix(_CONSTANTS)
            with file.open(f"{root}/data.pkl") as data:
                unpickler = _Unpickler(data, lambda key: file.read(f"{root}/data/{key}"))
                module = unpickler.load()
            named = dict(_tensors(module))
    except _FAULTS as error:
        raise UserError(f"weights file {path}, a TorchScript archive, cannot be read: {first_line(error)}") from None
    tensors = {name: tensor for name, tensor in named.items() if name.rpartition(".")[2] != "attn_mask"}
    return Archive(tensors, frozenset(unpickler.classes))


class _Inert:
    """Stands for an object of whatever class: it keeps its attributes and does nothing."""

    attributes: Mapping[str, Any]

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        inert = super().__new__(cls)
        inert.attributes = {}
        return inert

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Rebuild:
    """What a pickle calls for a tensor. No slots: a pickle can put nothing into it."""

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
        if offset < 0 or min((*size, *stride), default=0) < 0 or len(size) != len(stride):
            raise ValueError("a tensor with negative sizes")
        if math.prod(size) > len(storage):
            raise ValueError("a tensor is larger than its data")
        return torch.as_strided(storage, tuple(size), tuple(stride), offset)


class _First:
    """What a pickle calls for a typed list or value: it stays as it is."""

    __slots__ = ()

    def __call__(self, value: Any, *_: object) -> Any:
        return value


class _Unpickler(pickle.Unpickler):
    """Never imports anything: a name in the pickle is one of the few below, or stands for an `_Inert` object."""

    def __init__(self, data: IO[bytes], read: Callable[[str], bytes]) -> None:
        super().__init__(data)
        self.classes: set[str] = set()
        self._read = read
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle":
            return _First()
        self.classes.add(name.rpartition(".")[2])
        return _Inert

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: ("storage", its type, key, device, number of elements)."""
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            content = bytearray(self._read(key))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module and of those in it, by dotted name."""
    waiting: list[tuple[str, Any, int]] = [("", module, 0)]
    for _ in range(_MAX_OBJECTS):
        if not waiting:
            return
        prefix, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield prefix, value
        elif isinstance(value, _Inert) and depth < _MAX_DEPTH:
            inner = [(f"{prefix}.{name}" if prefix else str(name), one) for name, one in value.attributes.items()]
            waiting += [(name, one, depth + 1) for name, one in reversed(inner)]
    raise ValueError("its modules have no end")
