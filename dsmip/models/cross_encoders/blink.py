"""BLINK (Wu et al., EMNLP 2020): a bi-encoder finds candidates, a cross-encoder reads each beside the mention.

Texts alone. Decisions of ours: the word is marked in its sentence by tokens that BERT's vocabulary has for nobody
([unused0], [unused1]), name and attributes are parted by a third one; the cross-encoder reads a mention's tokens and
behind them an entity's, without numbers of segments; it is trained on each mention's gold among the entities that the
finished bi-encoder takes it for, which are looked for once.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.errors import UserError
from dsmip.models.base import System
from dsmip.models.bert import Pooling, TextEncoder, check_first_token
from dsmip.units.matcher import Matcher, Reranker, VectorMatcher

BI_ENCODER, CROSS_ENCODER = "biencoder", "crossencoder"


class BlinkConfig(Frozen):
    """The `system` section.

    Attributes:
        tune: Of the bi-encoder; the cross-encoder is always trained.
        pooling: The vector of the first token ([CLS]), or what the tower pools as its authors do.
        candidates: How many entities of the bi-encoder's ranking the cross-encoder scores, in training the gold and
            one fewer of the others.
        num_tokens: Of a mention and of an entity beside one another in the cross-encoder, at most.
        markers: Tokens of the vocabulary that the template writes out.
    """

    tune: Tuning = "full"
    pooling: Pooling = "first"
    candidates: int = Field(64, ge=2)
    num_tokens: int = Field(128, ge=3)
    template: Template = Template(
        mention="{left} [unused0] {word} [unused1] {right}", entity="{name} [unused2] {attributes}"
    )
    markers: tuple[str, ...] = ("[unused0]", "[unused1]", "[unused2]")


class TwoTextEncoders(nn.Module):
    """A text encoder for mentions and another one for entities."""

    def __init__(self, backbone: BackboneConfig, tune: Tuning, pooling: Pooling) -> None:
        super().__init__()
        self.mentions = TextEncoder(backbone, tune, pooling)
        self.entities = TextEncoder(backbone, tune, pooling)


class BiEncoder(VectorMatcher[TwoTextEncoders]):
    """Products of vectors; without encoders it scores cached features."""

    features_name = "two text vectors 1"

    def __init__(self, encoder: TwoTextEncoders | None = None) -> None:
        super().__init__()
        self.encoder = encoder

    def encode_mentions(self, batch: ItemBatch) -> Table:
        features: Table = self._encoder().mentions(batch)
        return features

    def encode_entities(self, batch: ItemBatch) -> Table:
        features: Table = self._encoder().entities(batch)
        return features

    def feature_settings(self) -> Mapping[str, float]:
        return self._encoder().mentions.feature_settings()

    def prepare_mentions(self, features: Table) -> Table:
        return Table({"vector": features.dense("text")})

    def prepare_entities(self, features: Table) -> Table:
        return self.prepare_mentions(features)


class CrossEncoder(Reranker):
    """A text tower that reads a mention and an entity as one text, and a linear map of its vector to a score."""

    def __init__(self, backbone: BackboneConfig, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = TextEncoder(backbone, "full", pooling)
        tower = self.encoder.backbone
        self.out = nn.Linear(tower.text_width if pooling == "first" else tower.embed_width, 1)

    def score_pairs(self, mentions: ItemBatch, entities: ItemBatch, mention_P: Tensor, entity_P: Tensor) -> Tensor:
        ids_PL, mask_PL = one_text(
            mentions.token_ids[mention_P],
            mentions.token_mask[mention_P],
            entities.token_ids[entity_P],
            entities.token_mask[entity_P],
        )
        nothing = torch.zeros(len(ids_PL), 3, 1, 1, dtype=torch.uint8, device=ids_PL.device)
        batch = ItemBatch(ids_PL, mask_PL, nothing, nothing[:, 0, 0, 0] > 0)
        score_P: Tensor = self.out(self.encoder(batch).dense("text"))[:, 0]
        return score_P


def one_text(
    first_PL: Tensor, first_mask_PL: Tensor, second_PR: Tensor, second_mask_PR: Tensor
) -> tuple[Tensor, Tensor]:
    """Two texts as one: the tokens of the first, then those of the second but its first one, which starts a text.

    Args:
        first_PL, second_PR: Ids int64, padding behind each text, as the first one's padding says it.
        first_mask_PL, second_mask_PR: bool, False at padding.

    Returns:
        Ids int64 and mask bool [P, L + R - 1], as long as the longest needs.
    """
    second_PR, second_mask_PR = second_PR[:, 1:], second_mask_PR[:, 1:]
    length_P, further_P = first_mask_PL.sum(dim=1), second_mask_PR.sum(dim=1)
    longest = int((length_P + further_P).max()) if len(first_PL) else first_PL.shape[1]
    ids = F.pad(first_PL, (0, max(longest - first_PL.shape[1], 0)))[:, :longest].clone()
    place_R = torch.arange(second_PR.shape[1], device=first_PL.device)
    pair_T, at_T = second_mask_PR.nonzero(as_tuple=True)
    ids[pair_T, length_P[pair_T] + place_R[at_T]] = second_PR[pair_T, at_T]
    mask = torch.arange(longest, device=first_PL.device) < (length_P + further_P)[:, None]
    return ids, mask


class Blink(System):
    """How BLINK is built: the bi-encoder, then the cross-encoder over its best entities."""

    name: ClassVar[str] = "blink"
    paper: ClassVar[str] = "Wu et al., EMNLP 2020"
    published_config: ClassVar[str] = "blink_wikimel"
    config_class: ClassVar[type[Frozen]] = BlinkConfig
    gated: ClassVar[bool] = False

    @classmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        return BI_ENCODER, CROSS_ENCODER

    @classmethod
    def rerankers(cls, section: Any) -> Mapping[str, str]:
        return {CROSS_ENCODER: BI_ENCODER}

    @classmethod
    def num_candidates(cls, section: Any) -> int:
        return int(section.candidates)

    @classmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        return (BI_ENCODER,)

    @classmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        return ()

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        length = section.num_tokens if part == CROSS_ENCODER else None
        return ItemFormat(section.template, num_tokens=length, modalities=("text",), markers=section.markers)

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        super().check(config, backbone)
        section: BlinkConfig = config.system
        check_first_token(section.pooling, config, backbone)
        if 2 * section.num_tokens - 1 > backbone.context_length:
            raise UserError(
                f"{CROSS_ENCODER}: a mention and an entity of {section.num_tokens} tokens each exceed the "
                f"{backbone.context_length} positions of {config.backbone.architecture}: set system.num_tokens to "
                f"{(backbone.context_length + 1) // 2}"
            )

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> Matcher:
        if part != BI_ENCODER:
            raise RuntimeError(f"{part} re-ranks: it is no matcher")
        section: BlinkConfig = config.system
        encoder = TwoTextEncoders(config.backbone, section.tune, section.pooling) if with_encoder else None
        return BiEncoder(encoder)

    @classmethod
    def build_reranker(cls, part: str, config: ExperimentConfig) -> Reranker:
        return CrossEncoder(config.backbone, config.system.pooling)

    @classmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        return cls.build_part(part, config, with_encoder=True)

    @classmethod
    def build_whole(cls, config: ExperimentConfig) -> Matcher:
        """The first stage without its towers: what is indexed."""
        return cls.build_part(BI_ENCODER, config, with_encoder=False)
