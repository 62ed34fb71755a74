"""The kinds of encoders that configurations name, as small as they come: for tests of systems with each of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from tests.support.encoders.small_bert import write_small_bert

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
_CONVOLUTIONAL = "test_efficientnet"  # of timm's own tests
_WORDS = ("a", "thing", ",", "number", ":", "colour", "red", "green", "blue", "1", "2", "3")


def _network(name: str, text: dict[str, Any], vision: dict[str, Any], **top: Any) -> Callable[[Path], str]:
    def written(folder: Path) -> str:
        config = {"embed_dim": 24, "text_cfg": TEXT | text, "vision_cfg": VISION | vision, **top}
        (folder / f"{name}.json").write_text(json.dumps(config))
        return str(folder / f"{name}.json")

    return written


def _timm(network: str, side: int, pool: str) -> dict[str, Any]:
    return {"image_size": side, "timm_model_name": network, "timm_pool": pool, "timm_proj": "linear"}


def _bert(folder: Path) -> Path:
    return write_small_bert(folder / "bert", _WORDS)


def _bert_beside_vit(folder: Path) -> str:
    bert = str(_bert(folder))
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "mean_pooler", "context_length": 24}
    config = {"embed_dim": 24, "text_cfg": {**text, "hf_proj_type": "linear"}, "vision_cfg": VISION}
    (folder / "bert.json").write_text(json.dumps(config))
    return str(folder / "bert.json")


def _timm_file(folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        save_file(timm.create_model(_CONVOLUTIONAL).state_dict(), folder / "vision.safetensors")
    return f"timm:{_CONVOLUTIONAL}@{folder}/vision.safetensors"


SMALL_BACKBONES: dict[str, Callable[[Path], str]] = {
    "open_clip ViT": _network("vit", {}, {}),
    "SigLIP": _network(
        "siglip",
        {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
        {"pool_type": "avg"},
        custom_text=True,
    ),
    "ResNet": _network("resnet", {}, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}),
    "timm ConvNet": _network("conv", {}, _timm("test_convnext", 32, "avg")),
    "timm ViT": _network("timm_vit", {}, _timm("test_vit", 160, "")),
    "BERT": _bert_beside_vit,
    "separate towers": lambda folder: f"hf:{_bert(folder)} + {_timm_file(folder)} + 24",
    "texts alone": lambda folder: f"hf:{_bert(folder)}",
    "pictures alone": _timm_file,
}
"""What makes the architecture of each kind; a folder of its own for what it refers to comes in."""
