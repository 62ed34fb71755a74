"""Reference values of published systems: those that the tests hold, and those that lie beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes
from tests.support.paths import ROOT

GOLDEN = ROOT.parent / "shared" / "golden"
SIZES, WIDTH = FeatureSizes(text_width=64, vision_width=96, embed_width=64), 24
"""Of all reference values."""


def stored_values(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def golden_values(name: str) -> dict[str, Tensor]:
    """Those of a file that lies beside the checkout; the test is skipped where it does not."""
    path = GOLDEN / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return stored_values(path)


def published_weights(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): t for name, t in values.items() if name.startswith("weights/")}


def published_features(values: dict[str, Tensor], side: str) -> Table:
    """Of `mention` or `entity`."""
    return Table(
        {
            "text_global": values[f"inputs/{side}_text_cls"],
            "text_tokens": Ragged.from_padded(values[f"inputs/{side}_text_tokens"]),
            "image_global": values[f"inputs/{side}_image_cls"],
            "image_tokens": Ragged.from_padded(values[f"inputs/{side}_image_tokens"]),
        }
    )
