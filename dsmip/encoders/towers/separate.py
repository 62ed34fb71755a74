"""Separate towers, a Hugging Face text encoder and a timm network or one of them, as a network of open_clip's form.

What joins two is one matrix each, without which a text tower of the shared width stays as it is.
"""

import difflib
import os.path
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from dsmip.encoders.formats.hugging_face_files import model_file
from dsmip.errors import UserError, first_line
from dsmip.separate_towers import SeparateTowers
from dsmip.storage.parsing import parse_json

MAX_CONTEXT = 512
_TYPES = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")  # those that open_clip's HFTextEncoder takes
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta")
# Of sentence-transformers, by the key that says so.
_POOLERS = {
    "pooling_mode_cls_token": "cls_last_hidden_state_pooler",
    "pooling_mode_max_tokens": "max_pooler",
    "pooling_mode_mean_tokens": "mean_pooler",
}
_NO_TEXT, _NO_VISION = {"context_length": 77}, {"image_size": 1}  # an empty text's places, and a picture's least side
_RESIZE = {"center": "shortest", "squash": "squash"}


def as_open_clip(towers: SeparateTowers) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg`, as open_clip writes them; of a tower that is not there next to nothing.

    Raises:
        UserError: A tower is unknown, cannot be had, or is of a kind that does not fit.
    """
    width, text = _text_tower(towers.text) if towers.text else (0, _NO_TEXT)
    features, vision, preprocess = (
        _vision_tower(towers.vision, towers.image_size) if towers.vision else (0, _NO_VISION, {})
    )
    embed_dim = towers.embed_dim or width or features
    if towers.text and width != embed_dim:  # else its vectors stay as they are
        text = {**text, "hf_proj_type": "linear"}
    config = {"embed_dim": embed_dim, "custom_text": True, "vision_cfg": dict(vision), "text_cfg": dict(text)}
    return {"model_cfg": config, "preprocess_cfg": dict(preprocess)}


def _text_tower(name: str) -> tuple[int, Mapping[str, Any]]:
    """Its width and its `text_cfg`."""
    config = _read(name, "config.json")
    kind = config.get("model_type")
    if kind not in _TYPES:
        raise UserError(
            f"backbone.text hf:{name} is a model of the type {kind!r}; a text tower is one of {', '.join(_TYPES)}"
        )
    pooling = _read(name, "1_Pooling/config.json", needed=False)
    pooler = next((pooler for key, pooler in _POOLERS.items() if pooling.get(key)), "mean_pooler")
    text = {
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_pooler_type": pooler,
        "hf_proj_type": None,
        "context_length": _context(name, config),
    }
    width = _size(name, config, "hidden_size") or _size(name, config, "d_model")
    if width is None:
        raise UserError(f"backbone.text hf:{name}: its config.json has neither hidden_size nor d_model")
    return width, text


def _context(name: str, config: Mapping[str, Any]) -> int:
    """Places for tokens, as many as its authors used: more cost more and were not trained."""
    places = _size(name, config, "max_position_embeddings") or MAX_CONTEXT
    if config["model_type"] in _POSITIONS_AFTER_PADDING:
        padding = config.get("pad_token_id")
        places -= (padding if isinstance(padding, int) else 1) + 1
    used = _size(name, _read(name, "sentence_bert_config.json", needed=False), "max_seq_length") or MAX_CONTEXT
    return min(places, used, MAX_CONTEXT)


def _size(name: str, config: Mapping[str, Any], key: str) -> int | None:
    """A size that a model states; None where it does not."""
    value = config.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"backbone.text hf:{name}: {key} must be a whole number above 0, not {str(value)[:80]!r}")
    return value


def _read(name: str, file: str, *, needed: bool = True) -> dict[str, Any]:
    """A JSON file of a folder, or of a model of the hub; empty where there is none and none is needed."""
    if os.path.isfile(name):
        raise UserError(f"backbone.text hf:{name} is a file: name its folder, which has config.json and the tokenizer")
    if not os.path.isdir(name) and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise UserError(f"backbone.text hf:{name}: no such folder")  # and no owner/model of the hub
    try:
        path = model_file(name, file, needed=needed)
    except UserError as error:
        raise UserError(f"backbone.text hf:{error}") from None
    if path is None:
        return {}
    found = parse_json(path.read_bytes(), path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object")
    return found


@cache
def _vision_tower(name: str, image_size: int | None) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """Its width, its `vision_cfg` and its `preprocess_cfg`: timm's own of these weights, but for a stated size."""
    import timm
    from timm.data import config as data_config

    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(name)
    except Exception as error:  # of names that ask a hub or a folder, others than of unknown ones
        known = timm.list_models()
        near = difflib.get_close_matches(name.partition(".")[0], known, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"backbone.vision timm:{name}: {first_line(error)}{hint}") from None
    if getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features:
        raise UserError(f"backbone.vision timm:{name} pools to another width than its features have; take another one")
    library: Any = data_config
    stated = library.resolve_data_config(pretrained_cfg=trunk.pretrained_cfg)
    size = stated["input_size"]
    if size[0] != 3 or size[1] != size[2]:
        raise UserError(f"backbone.vision timm:{name} wants pictures of {size}, and is given square ones of 3 colours")
    if image_size is not None and image_size != size[1]:
        _check_size(name, trunk, image_size, size[1])
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": image_size or size[1]}
    preprocess = {
        "mean": list(stated["mean"]),
        "std": list(stated["std"]),
        "interpolation": stated["interpolation"],
        "resize_mode": _RESIZE.get(stated["crop_mode"], "shortest"),
        "crop_pct": stated["crop_pct"],
    }
    return int(trunk.num_features), vision, preprocess


def _check_size(name: str, trunk: Any, image_size: int, own_size: int) -> None:
    """Convolutions take any size that leaves something of a picture; most transformers know the places of one."""
    try:
        features = trunk.eval().forward_features(torch.empty(1, 3, image_size, image_size, device="meta"))
        if not features.numel():
            raise ValueError("nothing is left of them")
    except Exception as error:  # a network says in its own way what it cannot take
        raise UserError(
            f"backbone.image_size {image_size}: timm:{name} takes pictures of {own_size} px, not "
            f"these ({first_line(error)})"
        ) from None
