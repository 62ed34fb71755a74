"""The towers of a network: which kind each of its two sides is."""

from typing import Any

from dsmip.encoders.towers.absent import AbsentText, AbsentVision
from dsmip.encoders.towers.base import TextTower, VisionTower
from dsmip.encoders.towers.hugging_face_text import HuggingFaceText
from dsmip.encoders.towers.open_clip_text import OpenClipText
from dsmip.encoders.towers.open_clip_vision import OpenClipVision, ResNetVision
from dsmip.encoders.towers.timm_vision import TimmVision


def text_tower(clip: Any, context_length: int) -> TextTower:
    """The text side of an open_clip network.

    Args:
        clip: `CLIP`, `CustomTextCLIP` or `CoCa`, or one tower alone: its `text` or its `visual` is None then.
        context_length: Places of a Hugging Face encoder, which does not say it itself.
    """
    from open_clip.hf_model import HFTextEncoder

    text = getattr(clip, "text", clip)
    if text is None:
        return AbsentText()
    return HuggingFaceText(text, context_length) if isinstance(text, HFTextEncoder) else OpenClipText(clip)


def vision_tower(clip: Any) -> VisionTower:
    """The vision side of an open_clip network."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    visual = clip.visual
    if visual is None:
        return AbsentVision()
    if isinstance(visual, TimmModel):
        return TimmVision(visual)
    return ResNetVision(visual) if isinstance(visual, ModifiedResNet) else OpenClipVision(visual)
