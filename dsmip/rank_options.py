"""Options of a ranking: how it is computed and where, which changes no rank."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsmip.errors import UserError

if TYPE_CHECKING:
    import torch

BackendName = Literal["auto", "torch", "cpp", "triton"]
PrecisionName = Literal["auto", "fp32", "fp16"]


@dataclass(frozen=True)
class RankOptions:
    """How a ranking is computed; ranks do not depend on it.

    Attributes:
        top_k: How many of the best entities of each mention are kept.
        backend: What computes token-level scores (see `dsmip.units.text_unit.use_backend`).
        precision: Of the token rows that they are computed from (see `dsmip.units.text_unit.use_precision`).
    """

    top_k: int = 20
    backend: BackendName = "auto"
    precision: PrecisionName = "auto"


def named_device(name: "str | torch.device") -> "torch.device":
    """The device of that name, wherever it is.

    Raises:
        UserError: There is no such name.
    """
    import torch  # which commands that only describe themselves do without

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name} is no device; use cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name} is not supported; use cpu, cuda or cuda:<number>")
    return device


def device_here(name: "str | torch.device") -> "torch.device":
    """The device of that name on this machine.

    Raises:
        UserError: There is no such name, or this machine has no such device.
    """
    import torch

    device = named_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs")
    return device
