"""GHMFC (Wang et al., SIGIR 2022): a mention's text and picture attend to one another by words and by phrases.

A gate fuses what is found to the mention's vector; an entity's vector is that of its text alone. Trained by triplets
with the hardest negative, and a contrast of a mention's text with its picture. Decisions of ours: tokens are those of
any backbone (published: BERT, and regions of a ResNet); levels have their own layers, and their means lie side by side;
a mention without a picture has one picture token, of zeros, and no part in the contrast.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.table import Ragged, Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.models.base import OnePartSystem
from dsmip.ops.losses import contrastive_loss, triplet_losses
from dsmip.units.matcher import BatchGold, VectorMatcher

_PHRASES = (1, 2, 3)  # words


class GhmfcConfig(Frozen):
    """The `system` section.

    Attributes:
        width: Of tokens in the co-attention.
        margin: Between the cosines of a gold and of a negative.
        contrast_weight: Of the contrast of a mention's text with its picture.
        temperature: Of that contrast.
        pixels: How pictures become squares; null: as the backbone's weights expect it.
    """

    tune: Tuning = "frozen"
    width: int = Field(512, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(8, ge=1)
    margin: float = Field(0.5, gt=0)
    contrast_weight: float = Field(1.0, ge=0)
    temperature: float = Field(0.6, gt=0)
    pixels: PixelForm | None = None
    template: Template = Template()


class TokenEncoder(nn.Module):
    """Both towers; of entities only texts are read."""

    def __init__(self, backbone: BackboneConfig, tune: Tuning) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune)

    def forward(self, batch: ItemBatch) -> Table:
        """Of mentions: `text` and `image`, ragged token rows [., d_t] and [., d_v], and `has_image` [N, 1]."""
        text = self.backbone.encode_text(batch.token_ids, batch.token_mask)
        image = self.backbone.encode_image(self.backbone.normalise(batch.images, batch.has_image))
        is_first_T = torch.arange(image.tokens.shape[1], device=image.tokens.device) == 0
        shown_N = batch.has_image
        return Table(
            {
                "text": Ragged.from_padded(text.tokens, text.mask),
                "image": Ragged.from_padded(image.tokens * shown_N[:, None, None], is_first_T | shown_N[:, None]),
                "has_image": shown_N.float()[:, None],
            }
        )

    def entities(self, batch: ItemBatch) -> Table:
        """`vector` [N, d_z], the text's."""
        return Table({"vector": self.backbone.encode_text(batch.token_ids, batch.token_mask).pooled})


class CoAttention(nn.Module):
    """Two sequences that attend to one another, layer by layer; each keeps its length."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"embed_dim": width, "num_heads": heads, "batch_first": True}
        self.to_text = nn.ModuleList(nn.MultiheadAttention(**options) for _ in range(layers))
        self.to_image = nn.ModuleList(nn.MultiheadAttention(**options) for _ in range(layers))
        self.text_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.image_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, text_NLd: Tensor, text_NL: Tensor, image_NPd: Tensor, image_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Both sequences after all layers; masks are True at tokens."""
        for to_text, to_image, text_norm, image_norm in zip(
            self.to_text, self.to_image, self.text_norms, self.image_norms, strict=True
        ):
            seen_NLd, _ = to_text(text_NLd, image_NPd, image_NPd, key_padding_mask=~image_NP, need_weights=False)
            read_NPd, _ = to_image(image_NPd, text_NLd, text_NLd, key_padding_mask=~text_NL, need_weights=False)
            text_NLd, image_NPd = text_norm(text_NLd + seen_NLd), image_norm(image_NPd + read_NPd)
        return text_NLd, image_NPd


class MentionFusion(nn.Module):
    """A mention's vector from its tokens: co-attention by words and by phrases, then a gate between the two sides."""

    def __init__(self, config: GhmfcConfig, sizes: FeatureSizes) -> None:
        super().__init__()
        width = config.width
        self.text, self.image = nn.Linear(sizes.text_width, width), nn.Linear(sizes.vision_width, width)
        self.phrases = nn.ModuleList(nn.Conv1d(width, width, size) for size in _PHRASES)
        self.words_level = CoAttention(width, config.heads, config.layers)
        self.phrases_level = CoAttention(width, config.heads, config.layers)
        self.text_out, self.image_out = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.gate, self.out = nn.Linear(2 * width, width), nn.Linear(width, sizes.embed_width)

    def forward(self, features: Table) -> tuple[Tensor, Tensor, Tensor]:
        """The vector [N, d_z], and the means of text and picture tokens before they meet, [N, width] each."""
        raw_text_NLt, text_NL = features.ragged("text").padded()
        raw_image_NPv, image_NP = features.ragged("image").padded()
        words_NLd = self.text(raw_text_NLt) * text_NL[..., None]
        image_NPd = self.image(raw_image_NPv) * image_NP[..., None]
        of_words = self.words_level(words_NLd, text_NL, image_NPd, image_NP)
        of_phrases = self.phrases_level(self._phrases(words_NLd, text_NL), text_NL, image_NPd, image_NP)
        text_Nd, seen_Nd = (
            out(torch.cat([_mean(level[side], mask) for level in (of_words, of_phrases)], dim=-1))
            for side, out, mask in ((0, self.text_out, text_NL), (1, self.image_out, image_NP))
        )
        share_Nd = self.gate(torch.cat([text_Nd, seen_Nd], dim=-1)).sigmoid()
        vector_Nz = self.out(share_Nd * text_Nd + (1 - share_Nd) * seen_Nd)
        return vector_Nz, _mean(words_NLd, text_NL), _mean(image_NPd, image_NP)

    def _phrases(self, words_NLd: Tensor, mask_NL: Tensor) -> Tensor:
        """The largest of what one, two and three words from each place on say."""
        words_NdL = words_NLd.transpose(1, 2)
        each = [conv(F.pad(words_NdL, (0, size - 1))) for conv, size in zip(self.phrases, _PHRASES, strict=True)]
        return torch.stack(each).amax(dim=0).transpose(1, 2) * mask_NL[..., None]


class GhmfcMatcher(VectorMatcher[TokenEncoder]):
    """Cosines of fused mentions with entities' texts; without an encoder it scores cached features."""

    features_name = "tokens of mentions, texts of entities 1"

    def __init__(self, config: GhmfcConfig, sizes: FeatureSizes, encoder: TokenEncoder | None = None) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.fusion = MentionFusion(config, sizes)
        self.entities = nn.Linear(sizes.embed_width, sizes.embed_width)

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self._encoder().entities(batch)

    def prepare_mentions(self, features: Table) -> Table:
        return Table({"vector": F.normalize(self.fusion(features)[0], dim=-1)})

    def prepare_entities(self, features: Table) -> Table:
        return Table({"vector": F.normalize(self.entities(features.dense("vector")), dim=-1)})

    def loss_mentions(self, features: Table) -> Table:
        vector_Nz, text_Nd, image_Nd = self.fusion(features)
        columns = {"text": text_Nd, "image": image_Nd, "has_image": features.dense("has_image")}
        return Table({"vector": F.normalize(vector_Nz, dim=-1), **columns})

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """Of triplets, and of the contrast of texts with their own pictures."""
        scores_ME = self.score(mentions, entities).total_ME
        triplets_M = triplet_losses(scores_ME, gold.column_M, gold.same_ME, margin=self.config.margin, hardest=True)
        shown_M = mentions.dense("has_image")[:, 0] > 0
        same_MM = gold.same_ME[:, gold.column_M] | (gold.column_M[:, None] == gold.column_M)
        text_Md, image_Md = (mentions.dense(name)[shown_M] for name in ("text", "image"))
        contrast = self._contrast(text_Md, image_Md, same_MM[shown_M][:, shown_M])
        return triplets_M.sum() + self.config.contrast_weight * contrast

    def _contrast(self, text_Md: Tensor, image_Md: Tensor, same_MM: Tensor) -> Tensor:
        """Of texts with their own pictures among the batch's of other golds, both ways, summed."""
        logits_MM = F.normalize(text_Md, dim=-1) @ F.normalize(image_Md, dim=-1).T / self.config.temperature
        own_M = torch.arange(len(logits_MM), device=logits_MM.device)
        return (contrastive_loss(logits_MM, own_M, same_MM) + contrastive_loss(logits_MM.T, own_M, same_MM.T)) / 2

    @property
    def loss_is_of_whole_batch(self) -> bool:
        return self.config.contrast_weight > 0


class Ghmfc(OnePartSystem):
    """How GHMFC is built: one part, which is the whole system."""

    name: ClassVar[str] = "ghmfc"
    paper: ClassVar[str] = "Wang et al., SIGIR 2022"
    published_config: ClassVar[str] = "ghmfc_wikimel"
    config_class: ClassVar[type[Frozen]] = GhmfcConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, pixels=section.pixels)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> GhmfcMatcher:
        section: GhmfcConfig = config.system
        encoder = TokenEncoder(config.backbone, section.tune) if with_encoder else None
        return GhmfcMatcher(section, feature_sizes(config.backbone.architecture), encoder)


def _mean(x_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    """[N, d] over real tokens; every item has one."""
    return (x_NTd * mask_NT[..., None]).sum(dim=1) / mask_NT.sum(dim=1, keepdim=True)
