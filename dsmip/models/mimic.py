"""MIMIC (Luo et al., KDD 2023): one CLIP for both sides, fine-tuned whole, and the mean of three matching units.

Follows the published code where it says more than the paper (`dsmip.units.shared_clip`); the text unit attends over
padding, as there.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.text import Template
from dsmip.encoders.base import feature_sizes
from dsmip.encoders.clip import Tuning
from dsmip.models.base import OnePartSystem
from dsmip.units.shared_clip import SharedClipEncoder, SharedClipMatcher
from dsmip.units.unit_scorer import UnitScorer


class MimicConfig(Frozen):
    """The `system` section.

    Attributes:
        num_tokens: Every text is cut or padded to this length.
        mask_padding: Whether the text unit ignores padding; the published model does not.
        pixels: How pictures become squares; null: as the backbone's weights expect it. The published model squashes.
    """

    added: ClassVar[Mapping[str, Any]] = {"pixels": None}

    tune: Tuning = "full"
    pixels: PixelForm | None = None
    width: int = Field(96, ge=1)
    num_tokens: int = Field(40, ge=3)
    mask_padding: bool = False
    template: Template = Template(mention="{word} [SEP] {sentence}", entity="{name} [SEP] {attributes}")


class MimicMatcher(SharedClipMatcher):
    """S = (S_T + S_V + S_C) / 3, with `parts` text, image and cross."""

    title = "MIMIC"
    published_units = {
        "units.text.": "matcher.tglu.",
        "units.image.": "matcher.vdlu.",
        "units.cross.": "matcher.cmfu.",
    }


class Mimic(OnePartSystem):
    """How MIMIC is built: one part, which is the whole system."""

    name: ClassVar[str] = "mimic"
    paper: ClassVar[str] = "Luo et al., KDD 2023"
    published_config: ClassVar[str] = "mimic_wikimel"
    published_sign: ClassVar[str] = "matcher.tglu."
    config_class: ClassVar[type[Frozen]] = MimicConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens, pixels=section.pixels)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> MimicMatcher:
        section: MimicConfig = config.system
        sizes, masked = feature_sizes(config.backbone.architecture), section.mask_padding
        scorer = UnitScorer(("text", "image"), sizes, section.width, mask_padding=masked)
        if not with_encoder:
            return MimicMatcher(scorer)
        encoder = SharedClipEncoder(config.backbone, section.tune, section.num_tokens, mask_padding=masked)
        return MimicMatcher(scorer, encoder)
