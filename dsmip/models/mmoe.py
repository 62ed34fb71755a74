"""MMoE (multi-level mixture of experts, 2025): MIMIC's form, whose units see tokens through a mixture of experts.

Follows the released code where it says more than the paper, but for its gate, whose scores depend on which items share
a batch: `gate: published` has it for comparison, `gate: per_token` is what the paper describes.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, model_validator

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Tuning
from dsmip.models.base import OnePartSystem
from dsmip.units.matcher import FixedBatches
from dsmip.units.mixture import GateName, MixedCrossUnit, MixedTokensUnit, Mixture
from dsmip.units.shared_clip import SharedClipEncoder, SharedClipMatcher
from dsmip.units.unit_scorer import MakeUnits, UnitScorer

_PUBLISHED_UNITS = {"text": "text_module", "image": "vision_module", "cross": "cross_module"}
_BATCH_BOUND = "system.gate: published gives an item other scores with every batch that it is in (per_token does not)"
_PUBLISHED_BATCHES = FixedBatches(mentions=20, entities=6000, reason=_BATCH_BOUND)  # of the released evaluation


class MmoeConfig(Frozen):
    """The `system` section.

    Attributes:
        num_tokens: Every text is cut or padded to this length; as published as many as a picture has tokens.
        top_k: How many of the experts a token keeps: as published 3 on WikiMEL, 4 on RichpediaMEL, 2 on WikiDiverse.
        gate: `per_token`: every token has its own best experts. `published`: the released gate, which only ranks whole
            splits, 20 mentions and 6,000 entities at a time, as the released evaluation does.
    """

    tune: Tuning = "full"
    pixels: PixelForm | None = None
    width: int = Field(96, ge=1)
    num_tokens: int = Field(50, ge=3)
    num_experts: int = Field(4, ge=1)
    top_k: int = Field(3, ge=1)
    gate: GateName = "per_token"
    template: Template = Template(mention="{word} [SEP] {sentence}", entity="{name} [SEP] {attributes}")

    @model_validator(mode="after")
    def _keeps_no_more_than_there_are(self) -> "MmoeConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: {self.top_k} exceeds num_experts {self.num_experts}")
        return self


class MmoeMatcher(SharedClipMatcher):
    """The mean of text, image and cross."""

    title = "MMoE"

    def __init__(self, config: MmoeConfig, sizes: FeatureSizes, encoder: SharedClipEncoder | None = None) -> None:
        super().__init__(UnitScorer(("text", "image"), sizes, config.width, units=_units(config, sizes)), encoder)
        self.published_units = dict(_published_units(config.num_experts))
        self.gate = config.gate

    def fixed_batches(self) -> FixedBatches | None:
        return _PUBLISHED_BATCHES if self.gate == "published" else None


class Mmoe(OnePartSystem):
    """How MMoE is built: one part, which is the whole system."""

    name: ClassVar[str] = "mmoe"
    paper: ClassVar[str] = "Multi-level mixture of experts, 2025"
    published_config: ClassVar[str] = "mmoe_wikimel"
    published_sign: ClassVar[str] = "matcher.text_module."
    released_with: ClassVar[tuple[str, ...]] = ("system.gate=published",)
    config_class: ClassVar[type[Frozen]] = MmoeConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens, pixels=section.pixels)

    @classmethod
    def why_not_trained(cls, section: Any) -> str | None:
        return f"{_BATCH_BOUND}, so it only ranks" if section.gate == "published" else None

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> MmoeMatcher:
        section: MmoeConfig = config.system
        sizes = feature_sizes(config.backbone.architecture)
        if not with_encoder:
            return MmoeMatcher(section, sizes)
        encoder = SharedClipEncoder(config.backbone, section.tune, section.num_tokens, mask_padding=False)
        return MmoeMatcher(section, sizes, encoder)


def _units(config: MmoeConfig, sizes: FeatureSizes) -> MakeUnits:
    width = config.width

    def mixture(input_width: int) -> Mixture:
        return Mixture(input_width, width, config.num_experts, config.top_k, config.gate)

    return {
        "text": lambda: MixedTokensUnit(mixture(sizes.embed_width), sizes.text_width, width),
        "image": lambda: MixedTokensUnit(mixture(width), width, width),
        "cross": lambda: MixedCrossUnit(mixture(width), sizes.embed_width, sizes.text_width, width),
    }


def _published_units(num_experts: int) -> Iterator[tuple[str, str]]:
    for unit, module in _PUBLISHED_UNITS.items():
        mixture, published = f"units.{unit}.mixture.", f"matcher.{module}.moe_layer."
        yield f"{mixture}gate_fc.", f"{published}gate.w_gate."
        for number in range(num_experts):
            yield f"{mixture}experts.{number}.0.", f"{published}experts.{number}.ff.0.0."
            yield f"{mixture}experts.{number}.2.", f"{published}experts.{number}.ff.2."
        yield f"units.{unit}.", f"matcher.{module}."
