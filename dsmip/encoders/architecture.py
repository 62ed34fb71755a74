"""Architectures by name: an open_clip name, a shipped JSON, or a JSON file of the user's."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsmip.data.images import PixelForm
from dsmip.data.text import ClipTokenizer, HuggingFaceTokenizer, Tokenizer
from dsmip.encoders.formats.statistics import pixel_statistics
from dsmip.encoders.towers.separate import as_open_clip
from dsmip.encoders.towers.stem import STEM, check_stem
from dsmip.errors import UserError
from dsmip.separate_towers import SeparateTowers
from dsmip.storage.parsing import parse_json

MODEL_NAME = "hf_model_name"
HUGGING_FACE_NAMES = (MODEL_NAME, "hf_tokenizer_name")
"""Keys of `text_cfg` that name a model of Hugging Face's hub, or a folder."""
SHIPPED = Path(__file__).parents[1] / "configs" / "backbones"
# OpenAI's CLIP statistics: the default of every open_clip model that states no others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_TOP_KEYS = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "multimodal_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network before its weights: open_clip's model config, and how it expects pictures.

    Attributes:
        name: What the user wrote.
        mean, std: Of pixels in [0, 1].
        pixels: How pictures become squares.
        is_open_clip: open_clip knows weights by tag for it.
        separate: The separate towers that it is made of, or the one.
    """

    name: str
    config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: PixelForm
    is_open_clip: bool
    separate: SeparateTowers | None = None

    def as_json(self) -> dict[str, Any]:
        """What `read_architecture` reads as the same network, of a file of open_clip's form."""
        preprocess = {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize_mode": {"crop": "shortest", "squash": "squash"}[self.pixels.resize],
            "interpolation": self.pixels.filter,
            **({} if self.pixels.part == 1 else {"crop_pct": self.pixels.part}),
        }
        return {"model_cfg": dict(self.config), "preprocess_cfg": preprocess}

    @property
    def embed_width(self) -> int:
        return int(self.config["embed_dim"])

    @property
    def context_length(self) -> int:
        return int(self.config["text_cfg"].get("context_length", 77))

    @property
    def image_size(self) -> int:
        return int(self.config["vision_cfg"].get("image_size", 224))

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config.get("quick_gelu", False))

    @property
    def is_hugging_face(self) -> bool:
        """Its text tower comes from the Hugging Face library."""
        return bool(self.config["text_cfg"].get("hf_model_name"))

    @property
    def is_plain(self) -> bool:
        """Both towers are open_clip's own transformers, whose widths are stated."""
        vision = self.config["vision_cfg"]
        return not (self.is_hugging_face or vision.get("timm_model_name") or isinstance(vision.get("layers"), list))

    @property
    def reads_padding(self) -> bool:
        """Its text tower reads all of its places (`TextTower.reads_padding`)."""
        text = self.config["text_cfg"]
        whole = text.get("no_causal_mask") or text.get("embed_cls") or text.get("pool_type") == "last"
        return bool(whole) and not self.is_hugging_face


def resolve_architecture(architecture: str) -> Architecture:
    """Reads and checks a backbone's configuration, no weights. Of a pair, one on a hub is downloaded once.

    Args:
        architecture: name of a shipped JSON ("tiny"), an open_clip name ("ViT-B-32"), or a path that ends in .json
            (open_clip's model config, or its open_clip_config.json with model_cfg and preprocess_cfg), or the text of
            a `SeparateTowers`.

    Raises:
        UserError: unknown name (nearest ones are listed), missing or wrong JSON, unknown key.
    """
    network = read_architecture(architecture)
    _check_keys_and_sizes(architecture, network.config)
    return network


def read_architecture(architecture: str) -> Architecture:
    """The configuration as it is written, for whoever needs its sizes only: checking it imports open_clip, seconds.

    Raises:
        UserError: An unknown name, or a missing or wrong JSON.
    """
    shipped, towers = SHIPPED / f"{architecture}.json", SeparateTowers.parsed(architecture)
    if towers is not None:
        stored, is_open_clip = as_open_clip(towers), False
    elif architecture.endswith(".json"):
        stored, is_open_clip = _beside(Path(architecture), _read_json(Path(architecture))), False
    elif shipped.name == f"{architecture}.json" and shipped.is_file():
        stored, is_open_clip = _read_json(shipped), False
    else:
        stored, is_open_clip = _open_clip_config(architecture), True
    config = stored.get("model_cfg", stored)
    preprocess = stored.get("preprocess_cfg") or (_of_all_tags(architecture) if is_open_clip else {})
    mean, std = pixel_statistics(preprocess, f"backbone {architecture}: preprocess_cfg")
    pixels = _pixel_form(architecture, preprocess)
    return Architecture(architecture, config, mean or CLIP_MEAN, std or CLIP_STD, pixels, is_open_clip, towers)


def build_tokenizer(architecture: str, markers: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a backbone: its context length and cleaning rule are read, never its weights.

    Args:
        markers: tokens of its vocabulary that a text may write out.

    Raises:
        UserError: unknown or unsupported architecture, or one whose vocabulary has not each of the markers.
    """
    network = resolve_architecture(architecture)
    text = network.config["text_cfg"]
    options, name = dict(text.get("tokenizer_kwargs") or {}), text.get("hf_tokenizer_name")
    if name is None and markers:
        raise UserError(
            f"backbone {architecture} has CLIP's vocabulary, without {', '.join(markers)} that the system's template "
            "marks the mention by: take a text tower of BERT's vocabulary (backbone.text: hf:<name or folder>)"
        )
    if name is None:
        return ClipTokenizer(network.context_length, options, fills_context=network.reads_padding)
    if text.get("tokenizer_mode") or not options.keys() <= {"clean", "strip_sep_token"}:
        raise UserError(
            f"backbone {architecture}: text_cfg.tokenizer_mode and tokenizer_kwargs {options} are unknown here"
        )
    whole = network.reads_padding
    return HuggingFaceTokenizer(name, network.context_length, fills_context=whole, markers=markers, **options)


def _pixel_form(name: str, preprocess: Mapping[str, Any]) -> PixelForm:
    resize = {"shortest": "crop", "squash": "squash"}.get(str(preprocess.get("resize_mode", "shortest")))
    form = {"resize": resize, "filter": preprocess.get("interpolation", "bicubic")}
    form |= {"part": preprocess["crop_pct"]} if "crop_pct" in preprocess else {}
    try:
        return PixelForm.model_validate(form)
    except ValidationError:
        raise UserError(
            f"backbone {name}: preprocess_cfg: resize_mode is shortest or squash, interpolation bicubic, bilinear or "
            "lanczos, crop_pct a share of the picture, not "
            + ", ".join(repr(preprocess.get(key)) for key in ("resize_mode", "interpolation", "crop_pct"))
        ) from None


def _of_all_tags(name: str) -> dict[str, Any]:
    """What all published weights of an open_clip architecture say alike of their pictures."""
    from open_clip import pretrained as catalogue

    stated = [catalogue.get_pretrained_cfg(name, tag) for tag in catalogue.list_pretrained_tags_by_model(name)]
    keys = ("mean", "std", "resize_mode", "interpolation")
    return {
        key: stated[0][key]
        for key in keys
        if stated and all(one.get(key) == stated[0].get(key) is not None for one in stated)
    }


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


def _beside(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """A file's network, whose names of Hugging Face's models that begin with ./ are of folders beside the file."""
    config = stored.get("model_cfg", stored)
    text = config.get("text_cfg") if isinstance(config, dict) else None
    if not isinstance(text, dict):
        return stored
    names = {key: text[key] for key in HUGGING_FACE_NAMES if str(text.get(key, "")).startswith("./")}
    text = text | {key: str(path.absolute().parent / name) for key, name in names.items()}
    config = config | {"text_cfg": text}
    return stored | {"model_cfg": config} if "model_cfg" in stored else config


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


def _check_keys_and_sizes(name: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise UserError(f"backbone {name}: model_cfg must be an object with embed_dim, vision_cfg and text_cfg")
    _check_keys(name, "", config, _TOP_KEYS)
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(config.get(key), kind):
            raise UserError(f"backbone {name}: {key} is missing or not {'an integer' if kind is int else 'an object'}")
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for section, known in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        ours = [STEM] if section == "vision_cfg" else []
        _check_keys(name, f"{section}.", config[section], [*(field.name for field in fields(known)), *ours])
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
