"""DSMIP with random weights, and random features of its experts and gate."""

from typing import Any

import torch

from dsmip.config import ExperimentConfig, merged
from dsmip.data.table import Column, Ragged, Table
from dsmip.encoders.base import feature_sizes
from dsmip.models.dsmip import Dsmip, DsmipMatcher
from dsmip.units.expert import READS


def seeded(seed: int, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def with_system(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return config.model_copy(update={"system": merged(config.system, changes)})


def whole(config: ExperimentConfig, **gate: Any) -> DsmipMatcher:
    matcher = seeded(1, lambda: Dsmip.build_whole(with_system(config, gate=gate)))
    assert isinstance(matcher, DsmipMatcher)
    return matcher.eval()


def features(config: ExperimentConfig, count: int, seed: int) -> Table:
    """Random features of all experts and of the gate; of cross-modal ones what they read of either side."""
    sizes, generator = feature_sizes(config.backbone.architecture), torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (count,), generator=generator)

    def ragged(width: int) -> Ragged:
        values = torch.randn(int(lengths.sum()), width, generator=generator)
        return Ragged(values, lengths.cumsum(0) - lengths, lengths)

    columns: dict[str, Column] = {
        "gate.text": torch.randn(count, sizes.text_width, generator=generator),
        "gate.picture": torch.randn(count, sizes.embed_width, generator=generator),
    }
    for part, reads in READS.items():
        for kind in reads.either:
            width = sizes.text_width if kind == "text" else sizes.vision_width
            columns[f"{part}.{kind}_global"] = torch.randn(count, sizes.embed_width, generator=generator)
            columns[f"{part}.{kind}_tokens"] = ragged(width)
    return Table(columns)
