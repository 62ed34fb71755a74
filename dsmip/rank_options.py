"""Options of a ranking: how it is computed, which changes no rank."""

from dataclasses import dataclass
from typing import Literal

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
