"""Tensors of a TorchScript archive, as OpenAI published CLIP: a program with its weights, of which nothing is run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmip.encoders.formats.pickled import Inert, StoredTensor, has_member, opened_archive

_CONSTANTS = "/constants.pkl"  # only a TorchScript archive has it
_MAX_OBJECTS, _MAX_DEPTH = 200_000, 100


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
    return has_member(path, _CONSTANTS)


def read_archive(path: Path) -> Archive:
    """The tensors of a TorchScript archive.

    Raises:
        UserError: It is damaged, or not made as TorchScript makes them.
    """
    with opened_archive(path, f"weights file {path}, a TorchScript archive,") as archive:
        stored = {name: each for name, each in _tensors(archive.content) if name.rpartition(".")[2] != "attn_mask"}
        tensors = {name: archive.read(each) for name, each in stored.items()}
    return Archive(tensors, archive.classes)


def _tensors(module: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of a module and of those in it, by dotted name."""
    waiting: list[tuple[str, Any, int]] = [("", module, 0)]
    for _ in range(_MAX_OBJECTS):
        if not waiting:
            return
        prefix, value, depth = waiting.pop()
        if isinstance(value, StoredTensor):
            yield prefix, value
        elif isinstance(value, Inert) and depth < _MAX_DEPTH:
            inner = [(f"{prefix}.{name}" if prefix else str(name), one) for name, one in value.attributes.items()]
            waiting += [(name, one, depth + 1) for name, one in reversed(inner)]
    raise ValueError("its modules have no end")
