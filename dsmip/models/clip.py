"""CLIP (Radford et al., 2021) as a linker: one vector per item of its text and picture, compared by their cosine.

Zero-shot (`tune: frozen`) nothing is trained. Decisions of ours, as papers that report CLIP are silent: an item's
vector is the weighted mean of its text's and its picture's vectors, each of length one, brought to length one; an item
without a picture is its text alone; the loss contrasts a batch's mentions with their golds, with a learned temperature.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat, Modality
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.models.base import OnePartSystem
from dsmip.units.matcher import VectorMatcher

_LOG_SCALE = 2.6593  # of CLIP's start, log(1 / 0.07)
_HIGHEST = 4.6052  # log(100), as in CLIP


class ClipConfig(Frozen):
    """The `system` section.

    Attributes:
        tune: frozen is zero-shot.
        image_weight: Of the picture in an item's vector; 0 is text alone (so may the backbone be), 1 the picture alone
            where there is one.
        pixels: How pictures become squares; null: as the backbone's weights expect it.
    """

    tune: Tuning = "full"
    image_weight: float = Field(0.5, ge=0, le=1)
    pixels: PixelForm | None = None
    template: Template = Template()


class ClipEncoder(nn.Module):
    """Both towers, the same for mentions and entities."""

    def __init__(self, config: ClipConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(config.tune)
        self.image_weight = config.image_weight

    def train(self, mode: bool = True) -> "ClipEncoder":
        """Towers always run in eval mode: they must give the same features twice (cached gradients)."""
        return super().train(False)

    def forward(self, batch: ItemBatch) -> Table:
        """`vector` [N, d_z] of length one."""
        text_Nz = F.normalize(self.backbone.encode_text(batch.token_ids, batch.token_mask).pooled, dim=-1)
        if not self.image_weight:
            return Table({"vector": text_Nz})
        pixels = self.backbone.normalise(batch.images, batch.has_image)
        image_Nz = F.normalize(self.backbone.encode_image(pixels).pooled, dim=-1)
        mean_Nz = torch.lerp(text_Nz, image_Nz, self.image_weight)
        return Table({"vector": F.normalize(torch.where(batch.has_image[:, None], mean_Nz, text_Nz), dim=-1)})


class ClipMatcher(VectorMatcher[ClipEncoder]):
    """Scaled cosines; without an encoder it scores cached features."""

    features_name = "mean of pooled 1"

    def __init__(self, *, scale_trains: bool, encoder: ClipEncoder | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.log_scale = nn.Parameter(torch.tensor(_LOG_SCALE), requires_grad=scale_trains)

    def prepare_mentions(self, features: Table) -> Table:
        """The scale is a mention's: an index of entities does not depend on it."""
        return Table({"vector": features.dense("vector") * self.log_scale.clamp(max=_HIGHEST).exp()})

    def prepare_entities(self, features: Table) -> Table:
        return features

    def feature_settings(self) -> Mapping[str, float]:
        return {"image_weight": self._encoder().image_weight}


class Clip(OnePartSystem):
    """How CLIP is built: one part, which is the whole system."""

    name: ClassVar[str] = "clip"
    paper: ClassVar[str] = "Radford et al., ICML 2021"
    published_config: ClassVar[str] = "clip_wikimel"
    config_class: ClassVar[type[Frozen]] = ClipConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        modalities: tuple[Modality, ...] = ("text", "image") if section.image_weight else ("text",)
        return ItemFormat(section.template, modalities=modalities, pixels=section.pixels)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> ClipMatcher:
        section: ClipConfig = config.system
        encoder = ClipEncoder(section, config.backbone) if with_encoder else None
        return ClipMatcher(scale_trains=section.tune != "frozen", encoder=encoder)
