"""Architectures by name: an open_clip name, a shipped JSON, or a JSON file of the user's."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsmip.data.text import Tokenizer
from dsmip.encoders.stem import STEM, check_stem
from dsmip.errors import UserError
from dsmip.storage.parsing import parse_json

SHIPPED = Path(__file__).parents[1] / "configs" / "backbones"
CLIP_VOCAB_SIZE = 49408
# OpenAI's CLIP statistics: the default of every open_clip model that states no others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_TOP_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale")
# What the towers are walked for; any other value changes which tokens exist or what pooling means.
_VISION_MUST_BE = {"timm_model_name": None, "attentional_pool": False, "pool_type": "tok", "patch_dropout": 0.0}
_TEXT_MUST_BE = {
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "vocab_size": CLIP_VOCAB_SIZE,
}
_SUPPORTED = (
    "supported are open_clip's own VisionTransformer (class-token pooling) and causal TextTransformer (end-of-text"
    " pooling, CLIP vocabulary), such as ViT-B-32, ViT-B-16, ViT-L-14 or ViT-H-14"
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network before its weights: open_clip's model config, and the pixel statistics it expects.

    `name` is what the user wrote; `is_open_clip` says that open_clip knows weights by tag for it.
    """

    name: str
    config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_open_clip: bool

    @property
    def context_length(self) -> int:
        return int(self.config["text_cfg"].get("context_length", 77))

    @property
    def image_size(self) -> int:
        return int(self.config["vision_cfg"].get("image_size", 224))

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config.get("quick_gelu", False))


def resolve_architecture(architecture: str) -> Architecture:
    """Reads and checks a backbone's configuration; no weights, no network access.

    Args:
        architecture: name of a shipped JSON ("tiny"), an open_clip name ("ViT-B-32"), or a path that ends in .json
            (open_clip's model config, or its open_clip_config.json with model_cfg and preprocess_cfg).

    Raises:
        UserError: unknown name (nearest ones are listed), missing or wrong JSON, unknown key, unsupported network.
    """
    network = read_architecture(architecture)
    _check_supported(architecture, network.config)
    return network


def read_architecture(architecture: str) -> Architecture:
    """The configuration as it is written, for whoever needs its sizes only: checking it imports open_clip, seconds.

    Raises:
        UserError: An unknown name, or a missing or wrong JSON.
    """
    shipped = SHIPPED / f"{architecture}.json"
    if architecture.endswith(".json"):
        stored, is_open_clip = _read_json(Path(architecture)), False
    elif shipped.name == f"{architecture}.json" and shipped.is_file():
        stored, is_open_clip = _read_json(shipped), False
    else:
        stored, is_open_clip = _open_clip_config(architecture), True
    config = stored.get("model_cfg", stored)
    mean, std = pixel_statistics(stored.get("preprocess_cfg", {}))
    return Architecture(architecture, config, mean or CLIP_MEAN, std or CLIP_STD, is_open_clip)


def build_tokenizer(architecture: str) -> Tokenizer:
    """The tokenizer of a backbone: its context length and cleaning rule are read, never its weights.

    Raises:
        UserError: unknown or unsupported architecture.
    """
    network = resolve_architecture(architecture)
    return Tokenizer(network.context_length, network.config["text_cfg"].get("tokenizer_kwargs") or {})


def pixel_statistics(preprocess: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of pixels in [0, 1] from an open_clip preprocessing config (None where unstated)."""
    mean, std = preprocess.get("mean"), preprocess.get("std")
    return (tuple(mean) if mean else None, tuple(std) if std else None)


def shipped_names() -> list[str]:
    """Backbones that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes(), f"backbone file {path}")
    except FileNotFoundError:
        raise UserError(f"backbone file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"backbone file {path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"backbone file {path} must hold a JSON object with embed_dim, vision_cfg and text_cfg")
    return value


def _open_clip_config(name: str) -> dict[str, Any]:
    import open_clip  # a slow import that a shipped or local JSON's tokenizer need not wait for

    config = open_clip.get_model_config(name) if not name.startswith(("hf-hub:", "local-dir:")) else None
    if config is None:
        known = [*shipped_names(), *open_clip.list_models()]
        lowered = {other.lower(): other for other in known}
        near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.4)]
        hint = f"nearest: {', '.join(near)}" if near else f"shipped: {', '.join(shipped_names())}"
        raise UserError(
            f"unknown backbone architecture {name!r} ({hint}); give an open_clip name, a shipped name or a .json file"
        )
    return dict(config)


def _check_supported(name: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise UserError(f"backbone {name}: model_cfg must be an object with embed_dim, vision_cfg and text_cfg")
    for key in ("multimodal_cfg", "init_logit_bias"):
        if key in config:
            raise UserError(f"backbone {name} has {key} (a CoCa or SigLIP model); {_SUPPORTED}")
    _check_keys(name, "", config, _TOP_KEYS)
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(config.get(key), kind):
            raise UserError(f"backbone {name}: {key} is missing or not {'an integer' if kind is int else 'an object'}")
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for section, known, required in (
        ("vision_cfg", CLIPVisionCfg, _VISION_MUST_BE),
        ("text_cfg", CLIPTextCfg, _TEXT_MUST_BE),
    ):
        stated = config[section]
        ours = [STEM] if section == "vision_cfg" else []
        _check_keys(name, f"{section}.", stated, [*(field.name for field in fields(known)), *ours])
        for key, value in required.items():
            if stated.get(key, value) != value:
                raise UserError(f"backbone {name}: {section}.{key} = {stated[key]!r} is not supported; {_SUPPORTED}")
    if not isinstance(config["vision_cfg"].get("layers", 12), int):
        raise UserError(f"backbone {name} has a ResNet vision tower; {_SUPPORTED}")
    if not isinstance(config["text_cfg"].get("context_length", 77), int):
        raise UserError(f"backbone {name}: text_cfg.context_length must be an integer")
    if not isinstance(config["vision_cfg"].get("image_size", 224), int):
        raise UserError(f"backbone {name}: vision_cfg.image_size must be one integer (square pictures)")
    if STEM in (vision := config["vision_cfg"]):
        check_stem(name, vision[STEM], vision.get("patch_size", 16), vision.get("image_size", 224))


def _check_keys(name: str, prefix: str, stated: Mapping[str, Any], known: list[str] | tuple[str, ...]) -> None:
    for key in stated:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise UserError(f"backbone {name}: unknown key {prefix}{key}{hint}")
