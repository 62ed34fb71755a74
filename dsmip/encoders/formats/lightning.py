"""Checkpoints of PyTorch Lightning, of which the model's tensors are read, and nothing is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmip.encoders.formats import torchscript
from dsmip.encoders.formats.pickled import StoredTensor, is_archive, opened_archive
from dsmip.errors import UserError

_STATE, _EPOCH, _VERSION = "state_dict", "epoch", "pytorch-lightning_version"
_NEEDED = "needed is a .ckpt file that PyTorch Lightning wrote, or a state dict that torch (1.6 or newer) did"


@dataclass(frozen=True, slots=True)
class LightningCheckpoint:
    """What a checkpoint says of its model.

    Attributes:
        tensors: The model's state dict.
        epoch, version: Of the training, and of Lightning; None: nothing is said.
    """

    tensors: dict[str, Tensor]
    epoch: int | None
    version: str | None


def read_checkpoint(path: Path) -> LightningCheckpoint:
    """Reads a checkpoint, or a file that has a state dict alone. The optimizer's tensors are passed over.

    Raises:
        UserError: There is no such file, or it is something else; the message says what would fit.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} {'is a folder' if path.is_dir() else 'does not exist'}; {_NEEDED}")
    if torchscript.is_archive(path):
        raise UserError(f"{path} is a TorchScript archive and no checkpoint; {_NEEDED}")
    if not is_archive(path):
        raise UserError(f"{path} is no checkpoint; {_NEEDED}")
    with opened_archive(path, f"checkpoint {path}") as archive:
        content: Any = archive.content
        state = content.get(_STATE, content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not any(isinstance(each, StoredTensor) for each in state.values()):
            raise UserError(f"{path} holds no state dict of tensors; {_NEEDED}")
        tensors = {str(name): archive.read(each) for name, each in state.items() if isinstance(each, StoredTensor)}
        return LightningCheckpoint(tensors, _plain(content, _EPOCH, int), _plain(content, _VERSION, str))


def _plain(content: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = content.get(key)
    return value if isinstance(value, kind) else None
