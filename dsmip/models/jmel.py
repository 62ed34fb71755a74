"""JMEL (Adjali et al., ECIR 2020): a branch per side joins an item's text and picture to one vector; triplets.

Its texts and pictures are what the towers of any backbone say of them (published: word n-grams and an Inception
network). Decisions of ours: each branch is one fully connected layer over both vectors side by side, each of length
one, zeros for a picture that is not there; vectors are compared by their cosine; all other entities of a batch are
negatives. Timelines and popularity of the published entities have no counterpart in these data sets.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.models.base import OnePartSystem
from dsmip.ops.losses import triplet_losses
from dsmip.units.matcher import BatchGold, VectorMatcher


class JmelConfig(Frozen):
    """The `system` section.

    Attributes:
        width: Of the joint space.
        margin: Between the cosines of a gold and of a negative.
        hardest: The best scored negative of a batch counts alone, not the mean of all.
        pixels: How pictures become squares; null: as the backbone's weights expect it.
    """

    tune: Tuning = "frozen"
    width: int = Field(512, ge=1)
    margin: float = Field(0.2, gt=0)
    hardest: bool = False
    pixels: PixelForm | None = None
    template: Template = Template()


class JointEncoder(nn.Module):
    """Both towers, the same for mentions and entities: `joint` [N, 2 d_z], text and picture of length one each."""

    def __init__(self, backbone: BackboneConfig, tune: Tuning) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune)

    def forward(self, batch: ItemBatch) -> Table:
        """Features of N items; zeros for a picture that is not there."""
        text_Nz = F.normalize(self.backbone.encode_text(batch.token_ids, batch.token_mask).pooled, dim=-1)
        pixels = self.backbone.normalise(batch.images, batch.has_image)
        image_Nz = F.normalize(self.backbone.encode_image(pixels).pooled, dim=-1) * batch.has_image[:, None]
        return Table({"joint": torch.cat([text_Nz, image_Nz], dim=-1)})


class JmelMatcher(VectorMatcher[JointEncoder]):
    """Cosines in the joint space; without an encoder it scores cached features."""

    features_name = "text beside image 1"

    def __init__(self, config: JmelConfig, sizes: FeatureSizes, encoder: JointEncoder | None = None) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.mentions = nn.Linear(2 * sizes.embed_width, config.width)
        self.entities = nn.Linear(2 * sizes.embed_width, config.width)

    def prepare_mentions(self, features: Table) -> Table:
        return Table({"vector": F.normalize(self.mentions(features.dense("joint")), dim=-1)})

    def prepare_entities(self, features: Table) -> Table:
        return Table({"vector": F.normalize(self.entities(features.dense("joint")), dim=-1)})

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        scores_ME = self.score(mentions, entities).total_ME
        settings: dict[str, Any] = {"margin": self.config.margin, "hardest": self.config.hardest}
        return triplet_losses(scores_ME, gold.column_M, gold.same_ME, **settings).sum()


class Jmel(OnePartSystem):
    """How JMEL is built: one part, which is the whole system."""

    name: ClassVar[str] = "jmel"
    paper: ClassVar[str] = "Adjali et al., ECIR 2020"
    published_config: ClassVar[str] = "jmel_wikimel"
    config_class: ClassVar[type[Frozen]] = JmelConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, pixels=section.pixels)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> JmelMatcher:
        section: JmelConfig = config.system
        encoder = JointEncoder(config.backbone, section.tune) if with_encoder else None
        return JmelMatcher(section, feature_sizes(config.backbone.architecture), encoder)
