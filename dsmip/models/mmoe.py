"""MMoE (multi-level mixture of experts, 2025): MIMIC's form, whose units see tokens through a mixture of experts.

Follows the released code where it says more than the paper, but for its gate, whose scores depend on which items share
a batch: `gate: published` has it for comparison, `gate: per_token` is what the paper describes.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.errors import UserError
from dsmip.models.base import OnePartSystem
from dsmip.units.mixture import GateName, MixedCrossUnit, MixedTokensUnit, Mixture
from dsmip.units.shared_clip import SharedClipEncoder, SharedClipMatcher
from dsmip.units.unit_scorer import MakeUnits, UnitScorer

_PUBLISHED_UNITS = {"text": "text_module", "image": "vision_module", "cross": "cross_module"}
_MENTION_BATCH, _ENTITY_CHUNK = 20, 6000  # of the released evaluation
_BATCH_BOUND = (
    "system.gate: published gives an item other scores with every batch that it is in, so it can be neither validated "
    "nor indexed; use per_token"
)


class MmoeConfig(Frozen):
    """The `system` section.

    Attributes:
        num_tokens: Every text is cut or padded to this length; as published as many as a picture has tokens.
        top_k: How many of the experts a token keeps: as published 3 on WikiMEL, 4 on RichpediaMEL, 2 on WikiDiverse.
        gate: `per_token`: every token has its own best experts. `published`: the released gate, which only ranks with
            its own fixed batches (`MmoeMatcher.scores_in_published_batches`): no training, no index.
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

    def why_not_indexed(self) -> str | None:
        return _BATCH_BOUND if self.gate == "published" else None

    @torch.no_grad()
    def scores_in_published_batches(self, mention_features: Table, entity_features: Table) -> Tensor:
        """Scores [M, E] as the released evaluation makes them: 20 mentions and 6,000 entities at a time, in order.

        Of `gate: published` they are meant for a whole split against a whole knowledge base, in the release's order.
        """
        mentions, entities = (
            [prepare(features.take(slice(start, start + size))) for start in range(0, len(features), size)]
            for features, prepare, size in (
                (mention_features, self.prepare_mentions, _MENTION_BATCH),
                (entity_features, self.prepare_entities, _ENTITY_CHUNK),
            )
        )
        return torch.cat([torch.cat([self.score(m, e).total_ME for e in entities], dim=1) for m in mentions])


class Mmoe(OnePartSystem):
    """How MMoE is built: one part, which is the whole system."""

    name: ClassVar[str] = "mmoe"
    paper: ClassVar[str] = "Multi-level mixture of experts, 2025"
    published_config: ClassVar[str] = "mmoe_wikimel"
    published_sign: ClassVar[str] = "matcher.text_module."
    config_class: ClassVar[type[Frozen]] = MmoeConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens, pixels=section.pixels)

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        super().check(config, backbone)
        if config.system.gate == "published":
            raise UserError(_BATCH_BOUND)

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
