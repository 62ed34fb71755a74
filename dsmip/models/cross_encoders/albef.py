"""ALBEF (Li et al., NeurIPS 2021): two towers are aligned before a fusion encoder reads a pair's tokens with pictures.

First the towers rank, as CLIP does, trained by contrast and by two losses of the fusion encoder: matching against the
negatives of the batch that the towers take for right, and masked tokens of a mention beside its gold. Then the fusion
encoder re-ranks the towers' best, trained further on each gold among them. Decisions of ours: a pair's text is the
mention's tokens and behind them the entity's, its pictures are both pictures' tokens (none where there is no picture);
the text tower is whole and the fusion layers are new (published: BERT's lower and upper half); the contrast goes from
mentions to entities, as in all systems here; there is no momentum model, so neither its distillation nor its queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
from dsmip.encoders.architecture import build_tokenizer
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.encoders.towers.base import TokenFeatures
from dsmip.errors import UserError
from dsmip.models.base import System
from dsmip.ops.augmentation import hide_tokens
from dsmip.ops.losses import drawn_negatives
from dsmip.units.matcher import Matcher, PairedItems, Reranker, VectorMatcher

TOWERS, FUSION = "towers", "fusion"
_LOG_SCALE = 2.6593  # of cosines at the start, log(1 / 0.07)
_HIGHEST = 4.6052  # log(100)


class AlbefConfig(Frozen):
    """The `system` section.

    Attributes:
        tune: Of the towers, in both parts.
        layers, heads: Of the fusion encoder, which is as wide as the text tower's tokens.
        candidates: How many entities of the towers' ranking are re-ranked, in training the gold and one fewer of the
            others.
        masked_weight: Of the loss of masked tokens; 0: none, for vocabularies without a token that hides another.
        masked_share: Of a mention's tokens.
        num_tokens: Of a text.
        pixels: How pictures become squares; null: as the backbone's weights expect it.
    """

    tune: Tuning = "full"
    layers: int = Field(6, ge=1)
    heads: int = Field(12, ge=1)
    candidates: int = Field(16, ge=2)
    masked_weight: float = Field(1.0, ge=0)
    masked_share: float = Field(0.15, gt=0, lt=1)
    num_tokens: int = Field(64, ge=3)
    pixels: PixelForm | None = None
    template: Template = Template()


@dataclass(frozen=True, slots=True)
class ItemTokens:
    """Tokens of N items; `image_mask` is False throughout where there is no picture."""

    text: Tensor
    text_mask: Tensor
    image: Tensor
    image_mask: Tensor

    def take(self, row_P: Tensor) -> "ItemTokens":
        """Those of the chosen items."""
        return ItemTokens(self.text[row_P], self.text_mask[row_P], self.image[row_P], self.image_mask[row_P])


class TowerEncoder(nn.Module):
    """Both towers, the same for mentions and entities."""

    def __init__(self, backbone: BackboneConfig, tune: Tuning) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune)

    def forward(self, batch: ItemBatch) -> Table:
        """`vector` [N, d_z] of length one: the mean of text's and picture's, the text's where there is no picture."""
        text, image = self._encoded(batch)
        text_Nz, image_Nz = F.normalize(text.pooled, dim=-1), F.normalize(image.pooled, dim=-1)
        mean_Nz = torch.where(batch.has_image[:, None], text_Nz + image_Nz, text_Nz)
        return Table({"vector": F.normalize(mean_Nz, dim=-1)})

    def tokens(self, batch: ItemBatch) -> ItemTokens:
        """What the fusion encoder reads of N items."""
        text, image = self._encoded(batch)
        return ItemTokens(text.tokens, text.mask, image.tokens, image.mask & batch.has_image[:, None])

    def _encoded(self, batch: ItemBatch) -> tuple[TokenFeatures, TokenFeatures]:
        text = self.backbone.encode_text(batch.token_ids, batch.token_mask)
        return text, self.backbone.encode_image(self.backbone.normalise(batch.images, batch.has_image))


class FusionEncoder(nn.Module):
    """Layers in which a pair's text tokens see one another and its pictures' tokens; matching and a word's head.

    Args:
        text_width, vision_width: Of tokens.
    """

    def __init__(self, text_width: int, vision_width: int, config: AlbefConfig) -> None:
        super().__init__()
        self.image = nn.Linear(vision_width, text_width)
        self.sides = nn.Parameter(torch.randn(2, 2, text_width) * 0.02)  # text and picture, of mention and entity
        self.no_picture = nn.Parameter(torch.randn(text_width) * 0.02)  # is there beside all pictures
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                text_width, config.heads, 4 * text_width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.norm, self.match = nn.LayerNorm(text_width), nn.Linear(text_width, 1)

    def forward(self, mentions: ItemTokens, entities: ItemTokens) -> Tensor:
        """Tokens of P pairs' texts [P, L, d_t], the mention's first."""
        text_side, image_side = self.sides
        x = torch.cat([mentions.text + text_side[0], entities.text + text_side[1]], dim=1)
        hidden_PL = ~torch.cat([mentions.text_mask, entities.text_mask], dim=1)
        pictures = [self.image(each.image) + image_side[n] for n, each in enumerate((mentions, entities))]
        seen = torch.cat([self.no_picture.to(x.dtype).expand(len(x), 1, -1), *pictures], dim=1)
        unseen_PT = ~torch.cat([mentions.image_mask, entities.image_mask], dim=1)
        for layer in self.layers:
            x = layer(x, seen, tgt_key_padding_mask=hidden_PL, memory_key_padding_mask=F.pad(unseen_PT, (1, 0)))
        fused: Tensor = self.norm(x)
        return fused

    def scores(self, mentions: ItemTokens, entities: ItemTokens) -> Tensor:
        """Logits of matching, float32 [P], from the mention's first token."""
        if not len(mentions.text):
            return mentions.text.new_zeros(0, dtype=torch.float32)
        score_P: Tensor = self.match(self(mentions, entities)[:, 0])[:, 0]
        return score_P.float()


class TowersMatcher(VectorMatcher[TowerEncoder]):
    """Scaled cosines of the towers' vectors; without an encoder it scores cached features.

    Attributes:
        fusion: Trained beside the towers, and no part of their scores; None without them.
        word: From a fused token to the input embeddings, whose products with it are a vocabulary's scores.
        mask_id: Token that hides another; None: no loss of masked tokens.
    """

    features_name = "mean of those pooled that are there 1"

    def __init__(self, config: AlbefConfig, encoder: TowerEncoder | None = None, mask_id: int | None = None) -> None:
        super().__init__()
        self.config, self.encoder, self.mask_id = config, encoder, mask_id
        self.log_scale = nn.Parameter(torch.tensor(_LOG_SCALE))
        self.fusion: FusionEncoder | None = None
        self.word: nn.Module | None = None
        if encoder is not None:
            width, vision_width = encoder.backbone.text_width, encoder.backbone.vision_width
            self.fusion = FusionEncoder(width, vision_width, config)
            if mask_id is not None:
                self.word = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))

    def prepare_mentions(self, features: Table) -> Table:
        """The scale is a mention's: an index of entities does not depend on it."""
        return Table({"vector": features.dense("vector") * self.log_scale.clamp(max=_HIGHEST).exp()})

    def prepare_entities(self, features: Table) -> Table:
        return features

    @property
    def reads_items(self) -> bool:
        return self.fusion is not None

    def item_loss(self, batch: PairedItems, rows: slice) -> Tensor:
        """Matching of gold pairs and of two wrong ones each, and the mentions' masked tokens."""
        generator = torch.Generator().manual_seed(batch.seed)
        encoder, fusion, column_M = self._encoder(), self.fusion, batch.gold.column_M
        assert fusion is not None
        mention_P, entity_P, is_right_P = _matching_pairs(self, batch, rows, generator)
        score_P = _pair_scores(encoder, fusion, batch.mentions, batch.entities, mention_P, entity_P)
        loss = F.binary_cross_entropy_with_logits(score_P, is_right_P, reduction="sum") / 3
        if self.mask_id is None:
            return loss
        assert self.word is not None
        embeddings: Tensor = encoder.backbone.text.embedding.get_parameter("weight")
        shown = batch.mentions
        ids_ML, hidden_ML = hide_tokens(
            shown.token_ids, shown.token_mask, self.config.masked_share, self.mask_id, len(embeddings), generator
        )
        few = ItemBatch(ids_ML, shown.token_mask, shown.images, shown.has_image).rows(rows.start, rows.stop)
        golds = encoder.tokens(_chosen(batch.entities, column_M[rows]))
        fused_mL = fusion(encoder.tokens(few), golds)[:, : ids_ML.shape[1]]
        hidden_mL, count_m = hidden_ML[rows], hidden_ML[rows].sum(dim=1)
        logits_T = (self.word(fused_mL[hidden_mL]) @ embeddings.T.to(fused_mL.dtype)).float()
        loss_T = F.cross_entropy(logits_T, shown.token_ids[rows][hidden_mL], reduction="none")
        per_mention_T = count_m.clamp_min(1)[hidden_mL.nonzero()[:, 0]]
        return loss + self.config.masked_weight * (loss_T / per_mention_T).sum()


class FusionReranker(Reranker):
    """The towers and the fusion encoder, of whose matching a pair's score is the logit."""

    def __init__(self, config: AlbefConfig, encoder: TowerEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.fusion = FusionEncoder(encoder.backbone.text_width, encoder.backbone.vision_width, config)

    def start_from(self, first_stage: Matcher) -> None:
        learned = first_stage.state_dict()
        self.load_state_dict({name: learned[name] for name in self.state_dict()})

    def score_pairs(self, mentions: ItemBatch, entities: ItemBatch, mention_P: Tensor, entity_P: Tensor) -> Tensor:
        return _pair_scores(self.encoder, self.fusion, mentions, entities, mention_P, entity_P)


def _pair_scores(
    encoder: TowerEncoder,
    fusion: FusionEncoder,
    mentions: ItemBatch,
    entities: ItemBatch,
    mention_P: Tensor,
    entity_P: Tensor,
) -> Tensor:
    """float32 [P]; the towers read each item once, and those that are in no pair not at all."""
    row_m, of_mention_P = mention_P.unique(return_inverse=True)
    row_e, of_entity_P = entity_P.unique(return_inverse=True)
    own, others = encoder.tokens(_chosen(mentions, row_m)), encoder.tokens(_chosen(entities, row_e))
    return fusion.scores(own.take(of_mention_P), others.take(of_entity_P))


def _matching_pairs(
    matcher: TowersMatcher, batch: PairedItems, rows: slice, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of mentions and of entities, and 1.0 where they match.

    Each mention's pairs: with its gold, with another entity, and its gold with another mention, both drawn by how well
    the towers score them; one is left out where the batch has none that is wrong.
    """
    column_M, same_ME = batch.gold.column_M, batch.gold.same_ME
    with torch.no_grad():
        mentions = matcher.prepare_mentions(batch.mention_features)
        score_ME = matcher.score(mentions, matcher.prepare_entities(batch.entity_features)).total_ME
    is_gold_ME = same_ME.scatter(1, column_M[:, None], True)
    other_M = drawn_negatives(score_ME, is_gold_ME, generator)[rows]
    of_gold_MM = score_ME[:, column_M].T  # row: a gold, column: a mention
    stranger_M = drawn_negatives(of_gold_MM, is_gold_ME[:, column_M].T, generator)[rows]
    own_m, column_m = torch.arange(len(column_M), device=column_M.device)[rows], column_M[rows]
    has_other_m, has_stranger_m = other_M >= 0, stranger_M >= 0
    mention_P = torch.cat([own_m, own_m[has_other_m], stranger_M[has_stranger_m]])
    entity_P = torch.cat([column_m, other_M[has_other_m], column_m[has_stranger_m]])
    return mention_P, entity_P, (torch.arange(len(mention_P), device=mention_P.device) < len(own_m)).float()


def _chosen(batch: ItemBatch, row_N: Tensor) -> ItemBatch:
    return ItemBatch(batch.token_ids[row_N], batch.token_mask[row_N], batch.images[row_N], batch.has_image[row_N])


class Albef(System):
    """How ALBEF is built: the towers, then the fusion encoder over their best entities."""

    name: ClassVar[str] = "albef"
    paper: ClassVar[str] = "Li et al., NeurIPS 2021"
    published_config: ClassVar[str] = "albef_wikimel"
    config_class: ClassVar[type[Frozen]] = AlbefConfig
    gated: ClassVar[bool] = False

    @classmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        return TOWERS, FUSION

    @classmethod
    def rerankers(cls, section: Any) -> Mapping[str, str]:
        return {FUSION: TOWERS}

    @classmethod
    def num_candidates(cls, section: Any) -> int:
        return int(section.candidates)

    @classmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        return (TOWERS,)

    @classmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        return ()

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens, pixels=section.pixels)

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        super().check(config, backbone)
        section: AlbefConfig = config.system
        if backbone.text_width % section.heads:
            raise UserError(
                f"system.heads: {section.heads} do not divide the {backbone.text_width} channels of text tokens of "
                f"{config.backbone.architecture}"
            )
        if section.masked_weight and build_tokenizer(config.backbone.architecture).mask_id is None:
            raise UserError(
                f"system.masked_weight: the vocabulary of {config.backbone.architecture} has no token that hides "
                "another: set it to 0, or take a text tower such as backbone.text: hf:bert-base-uncased"
            )

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> Matcher:
        if part != TOWERS:
            raise RuntimeError(f"{part} re-ranks: it is no matcher")
        section: AlbefConfig = config.system
        if not with_encoder:
            return TowersMatcher(section)
        mask_id = build_tokenizer(config.backbone.architecture).mask_id if section.masked_weight else None
        return TowersMatcher(section, TowerEncoder(config.backbone, section.tune), mask_id)

    @classmethod
    def build_reranker(cls, part: str, config: ExperimentConfig) -> Reranker:
        return FusionReranker(config.system, TowerEncoder(config.backbone, config.system.tune))

    @classmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        return cls.build_part(part, config, with_encoder=True)

    @classmethod
    def build_whole(cls, config: ExperimentConfig) -> Matcher:
        """The first stage without its towers: what is indexed."""
        return cls.build_part(TOWERS, config, with_encoder=False)
