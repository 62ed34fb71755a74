"""Networks of open_clip from an architecture, with random weights."""

from typing import Any

from torch import nn

from dsmip.encoders.architecture import Architecture
from dsmip.encoders.towers.stem import STEM, conv_stem
from dsmip.errors import UserError, first_line


def build_network(architecture: Architecture) -> nn.Module:
    """`CLIP`, `CustomTextCLIP` or `CoCa`, on the default device, drawn from the global generator.

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
    try:
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
