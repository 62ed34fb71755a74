"""How a ranking is computed. Exact ranks do not depend on it. (No torch: the command line reads this for its help.)"""

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["auto", "torch", "cpp"]


@dataclass(frozen=True)
class RankOptions:
    """backend: what computes token-level scores (see `dsmip.units.use_backend`)."""

    backend: BackendName = "auto"
