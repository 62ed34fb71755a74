"""Networks from an architecture, with random weights: open_clip's of two towers, and one tower alone."""

import math
from typing import Any

import torch
from torch import nn

from dsmip.encoders.architecture import Architecture
from dsmip.encoders.towers.stem import STEM, conv_stem
from dsmip.errors import UserError, first_line


class SingleTower(nn.Module):
    """A text encoder or a picture network alone, where open_clip's networks have both.

    Attributes:
        text: open_clip's `HFTextEncoder`, or None.
        visual: open_clip's `TimmModel`, whose pooled features are mapped to no other space, or None.
    """

    def __init__(self, text: nn.Module | None, visual: nn.Module | None) -> None:
        super().__init__()
        self.text, self.visual = text, visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def build_network(architecture: Architecture) -> nn.Module:
    """`CLIP`, `CustomTextCLIP`, `CoCa` or `SingleTower`, on the default device, drawn from the global generator.

    Raises:
        UserError: Its sizes do not fit one another, or what it is made of is not to be had.
    """
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    config = dict(architecture.config)
    custom_text = config.pop("custom_text", False) or architecture.is_hugging_face
    vision_cfg, text_cfg = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    stem: list[int] | None = vision_cfg.pop(STEM, None)
    # their weights come with those of the whole, or from a file of the tower's own
    vision_cfg["timm_model_pretrained"] = text_cfg["hf_model_pretrained"] = False
    vision, text = CLIPVisionCfg(**vision_cfg), CLIPTextCfg(**text_cfg)
    network: Any = CLIP if not custom_text else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    separate = architecture.separate
    try:
        if separate is not None and not (separate.text and separate.vision):
            return _single_tower(text, vision, architecture.embed_width)
        clip: nn.Module = network(vision_cfg=vision, text_cfg=text, **config)
    except OSError as error:  # a Hugging Face configuration
        raise UserError(
            f"backbone {architecture.name}: text_cfg.hf_model_name = {text.hf_model_name!r} cannot be had "
            f"({first_line(error)}); "
            "without internet give a folder that holds it"
        ) from None
    except Exception as error:  # whatever three libraries make of sizes and names that do not go together
        raise UserError(f"backbone {architecture.name} cannot be built from its sizes: {first_line(error)}") from None
    if stem is not None:
        tower: Any = clip.get_submodule("visual")
        tower.conv1 = conv_stem(stem, vision.width)
    return clip


def _single_tower(text: Any, vision: Any, width: int) -> SingleTower:
    """The tower that a name is stated of, as open_clip builds it beside another."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.timm_model import TimmModel

    if text.hf_model_name:
        encoder: Any = HFTextEncoder(
            text.hf_model_name, output_dim=width, pooler_type=text.hf_pooler_type, proj_type=None, pretrained=False
        )
        return SingleTower(encoder, None)
    visual: Any = TimmModel(vision.timm_model_name, width, image_size=vision.image_size, pool="", proj="linear")
    visual.head = nn.Sequential()
    return SingleTower(None, visual)
