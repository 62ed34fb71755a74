"""How a ranking is computed. Ranks do not depend on it. (No torch: the command line reads this for its help.)"""

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["auto", "torch", "cpp", "triton"]
PrecisionName = Literal["auto", "fp32", "fp16"]


@dataclass(frozen=True)
class RankOptions:
    """top_k: how many of the best entities of each mention are kept.

    backend: what computes token-level scores (see `dsmip.text_unit.use_backend`).

    precision: of the token rows that they are computed from (see `dsmip.text_unit.use_precision`).
    """

    top_k: int = 20
    backend: BackendName = "auto"
    precision: PrecisionName = "auto"
