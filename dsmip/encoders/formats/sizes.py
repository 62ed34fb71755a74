"""Networks of open_clip's list that weights would fit, by the sizes of their tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Where CLIP and CustomTextCLIP have them.
_CONTEXT = ("positional_embedding", "text.positional_embedding")
_VOCABULARY = ("token_embedding.weight", "text.token_embedding.weight")
_PATCHES = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")
_PLACES = ("visual.positional_embedding", "visual.trunk.pos_embed")
_VISION_BLOCKS = "visual.transformer.resblocks."


def networks_of_such_sizes(state: Mapping[str, Tensor]) -> list[str]:
    """Names in open_clip's list; empty where the sizes are of none, or of a kind of network that is not known here."""
    import open_clip

    context, vocabulary, patches, places = (
        next((state[name] for name in names if name in state), None)
        for names in (_CONTEXT, _VOCABULARY, _PATCHES, _PLACES)
    )
    if context is None or vocabulary is None or patches is None or places is None:
        return []
    patch = int(patches.shape[-1])
    image = patch * math.isqrt(int(places.shape[-2]))  # a class token more is no whole square
    text: list[Any] = [*context.shape, len(vocabulary)]
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        if text == _text_sizes(config) and (image, patch) == _picture_sizes(config) and _has_depth(config, state):
            found.append(name)
    return found


def _text_sizes(config: Mapping[str, Any]) -> Sequence[Any]:
    text = config.get("text_cfg", {})
    return [text.get("context_length", 77), text.get("width", 512), text.get("vocab_size", 49408)]


def _picture_sizes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    vision = config.get("vision_cfg", {})
    image, timm = vision.get("image_size", 224), vision.get("timm_model_name")
    if timm is None:
        return image, vision.get("patch_size", 16)
    stated = timm.partition("_patch")[2].partition("_")[0]
    return image, int(stated) if stated.isdigit() else None


def _has_depth(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """The layers of a vision transformer of open_clip's own; of timm's the text sizes tell enough."""
    vision = config.get("vision_cfg", {})
    layers = {name.split(".")[3] for name in state if name.startswith(_VISION_BLOCKS)}
    return bool(vision.get("timm_model_name")) != bool(layers) and (
        not layers or vision.get("layers", 12) == len(layers)
    )
