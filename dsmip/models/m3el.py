"""M3EL (Hu et al., KDD 2025): MIMIC's form with one kind of unit for both inputs, and a contrast within modalities.

Follows the released code where it says more than the paper. Two faults of the release do not have to be repeated:

* It trains the bidirectional cross unit on WikiDiverse and ranks with the other one, which then is untrained and a
  third of the score. Here `cross` names the unit that is trained and ranks.
* The tokens of its cross units are matched with a single pooled vector, so that the pooled branch does not see them.
  `match_keys: tokens` matches them with the other modality's tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Tuning
from dsmip.models.base import OnePartSystem
from dsmip.ops.losses import joint_contrast_losses
from dsmip.units.match_unit import BidirectionalMatch, MatchKeys, OneWayMatch
from dsmip.units.matcher import BatchGold
from dsmip.units.shared_clip import SharedClipEncoder, SharedClipMatcher
from dsmip.units.text_unit import TextUnit
from dsmip.units.unit_scorer import MakeUnits, UnitScorer

CrossName = Literal["one_way", "bidirectional"]
_TEMPERATURE, _INTRA_WEIGHT = 0.03, 0.8
_CONTRAST = "contrast"  # of the columns that only the loss reads
_CROSS_UNITS: Mapping[CrossName, type[OneWayMatch | BidirectionalMatch]] = {
    "one_way": OneWayMatch,
    "bidirectional": BidirectionalMatch,
}
_PUBLISHED_CROSS: Mapping[CrossName, str] = {"one_way": "matcher.cmm.", "bidirectional": "matcher.cmmb."}


class M3elConfig(Frozen):
    """The `system` section.

    Attributes:
        num_tokens: Every text is cut or padded to this length.
        mask_padding: Whether the units ignore padding; those of the release do not.
        cross: The cross unit, in training and in ranking. The release trains one_way on WikiMEL and RichpediaMEL, and
            bidirectional on WikiDiverse.
        match_keys: What the cross unit's tokens are matched with: the other modality's `pooled` vector, as released,
            or its `tokens`.
        contrast_weight: Of the contrast within modalities; 0 leaves it out.
    """

    tune: Tuning = "full"
    pixels: PixelForm | None = None
    width: int = Field(96, ge=1)
    num_tokens: int = Field(40, ge=3)
    mask_padding: bool = False
    cross: CrossName = "one_way"
    match_keys: MatchKeys = "pooled"
    contrast_weight: float = Field(1.0, ge=0)
    template: Template = Template(mention="{word} [SEP] {sentence}", entity="{name} [SEP] {attributes}")


class M3elMatcher(SharedClipMatcher):
    """The mean of text, image and cross; of text, image, text_image and image_text with the bidirectional unit."""

    title = "M3EL"

    def __init__(self, config: M3elConfig, sizes: FeatureSizes, encoder: SharedClipEncoder | None = None) -> None:
        super().__init__(UnitScorer(("text", "image"), sizes, config.width, units=_units(config, sizes)), encoder)
        self.contrast_weight = config.contrast_weight
        cross = _PUBLISHED_CROSS[config.cross]
        self.published_units = {
            "units.text.": "matcher.timm.",
            "units.image.": "matcher.iimm.",
            "units.cross.match_fc.": f"{cross}match_module.trans_linear.",
            "units.cross.fusion_fc.": f"{cross}fusion_module.linear.",
            "units.cross.": cross,
        }
        self.passed_over = (
            *(other for other in _PUBLISHED_CROSS.values() if other != cross),
            f"{cross}multi_head_module.",  # the weights of the mean over heads: ones, and not trained
            f"{cross}mclet_",
            "matcher.mclet_",
            "matcher.text_fc.",
            "matcher.image_fc.",
            "matcher.scale_",
            "matcher.weight_cl_loss.",
        )

    @property
    def loss_is_of_whole_batch(self) -> bool:
        return self.contrast_weight > 0

    def loss_mentions(self, features: Table) -> Table:
        return super().loss_mentions(features).merged(self._contrasted(features))

    def loss_entities(self, features: Table) -> Table:
        return super().loss_entities(features).merged(self._contrasted(features))

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """Sum of contrastive losses, of the total and of each unit, and of the contrast within modalities."""
        loss = super().loss(mentions, entities, gold)
        losses = partial(joint_contrast_losses, temperature=_TEMPERATURE, intra_weight=_INTRA_WEIGHT)
        own, others = mentions.under(_CONTRAST), entities.under(_CONTRAST)
        for name in own.columns:
            loss_M = losses(own.dense(name), others.dense(name), gold.column_M, gold.same_ME)
            loss = loss + self.contrast_weight * loss_M.sum() / 2
        return loss

    def _contrasted(self, features: Table) -> Table:
        """Pooled texts, and pooled pictures at unit width before their norm; nothing where they have no weight."""
        if not self.contrast_weight:
            return Table({})
        image_Nd = self.scorer.picture_norm.image_cls_fc(features.dense("image_global").float())
        return Table({"text": features.dense("text_global").float(), "image": image_Nd}).prefixed(_CONTRAST)


class M3el(OnePartSystem):
    """How M3EL is built: one part, which is the whole system."""

    name: ClassVar[str] = "m3el"
    paper: ClassVar[str] = "Hu et al., KDD 2025"
    published_config: ClassVar[str] = "m3el_wikimel"
    published_sign: ClassVar[str] = "matcher.timm."
    config_class: ClassVar[type[Frozen]] = M3elConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens, pixels=section.pixels)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> M3elMatcher:
        section: M3elConfig = config.system
        sizes = feature_sizes(config.backbone.architecture)
        if not with_encoder:
            return M3elMatcher(section, sizes)
        masked = section.mask_padding
        encoder = SharedClipEncoder(config.backbone, section.tune, section.num_tokens, mask_padding=masked)
        return M3elMatcher(section, sizes, encoder)


def _units(config: M3elConfig, sizes: FeatureSizes) -> MakeUnits:
    width, masked = config.width, config.mask_padding
    return {
        "text": partial(TextUnit, sizes.embed_width, sizes.text_width, width, mask_padding=masked),
        "image": partial(TextUnit, width, width, width, mask_padding=masked),
        "cross": partial(_CROSS_UNITS[config.cross], sizes.embed_width, sizes.text_width, width, config.match_keys),
    }
