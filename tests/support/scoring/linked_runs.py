"""Finished runs of any registered system on a small data set, whose parts have random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.models import find_system
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.runs.weights import own_weights
from dsmip.units.expert import Expert
from dsmip.units.matcher import Part

_TEXTS = {"mention": "{left} | {word} | {right}", "entity": "{name} : {attributes}"}
SMALL_FORMS: dict[str, dict[str, Any]] = {
    "dsmip": {
        "experts": {"text": {}, "visual": {}, "multimodal": {"prompt_length": 2, "prompt_depth": 2}},
        "width": 8,
        "gate": {"picture": "clip", "width": 8},
    },
    "blink": {"pooling": "tower", "markers": [], "candidates": 4, "num_tokens": 20, "template": _TEXTS},
    "albef": {"layers": 1, "heads": 2, "masked_weight": 0.0},
    "bert": {"pooling": "tower", "markers": []},
    "dzmned": {"width": 16},
    "ghmfc": {"width": 16, "heads": 2, "layers": 1},
}
"""The `system` section of each system, of the narrow backbone; what is not here has its defaults."""


def small_system(name: str, backbone: Path | str, **frame: Any) -> ExperimentConfig:
    """A small configuration of a registered system; `frame` changes anything but the system."""
    backbone_section = {"architecture": str(backbone)}
    return parse_config({"model": name, "backbone": backbone_section, "system": SMALL_FORMS.get(name, {}), **frame})


def finished_run(folder: Path, config: ExperimentConfig, dataset: Dataset, seed: int = 3) -> Run:
    """A run whose parts are finished and know nothing."""
    run = Run.create(folder, config, dataset)
    system = find_system(config.model)
    rerankers = system.rerankers(config.system)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in run.part_names:
            if name in rerankers:
                part: Part = system.build_reranker(name, config)
            else:
                part = system.build_part(name, config, with_encoder=True)
            run.save_part(name, _shaken(part), {})
        if system.gated:
            run.save_part(system.name, _shaken(system.build_whole(config)), {})
    return run


def break_long_texts(patch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """From now on DSMIP's experts encode texts of mentions of so many tokens and more as NaN."""
    encode = Expert.encode_mentions

    def broken(self: Expert, batch: ItemBatch) -> Table:
        features = encode(self, batch)
        if "text_global" in features.columns:
            features.dense("text_global")[batch.token_mask.sum(dim=1) >= num_tokens] = torch.nan
        return features

    patch.setattr(Expert, "encode_mentions", broken)


@torch.no_grad()
def _shaken(part: Part) -> Part:
    """Norms and biases start at 1 and 0, which would hide mistakes."""
    for tensor in own_weights(part).values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor)
    return part
