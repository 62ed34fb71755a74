"""An expert network: towers that encode an item once, units that score a pair (DSMIP section 3.2).

The experts are one class. The paper's three use the text, the picture or both, the same of mentions and of entities;
only the multimodal one has prompts and the cross unit. Two of ours compare one side's text with the other side's
picture (the first of the paper's limitations). Without an encoder an expert scores cached features.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dsmip.config import BackboneConfig, Frozen
from dsmip.data.collate import ItemBatch, Modality
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side, feature_sizes
from dsmip.encoders.clip import Backbone, TowerName, Tuning
from dsmip.encoders.towers.base import TokenFeatures
from dsmip.encoders.towers.prompts import InteractivePrompts
from dsmip.units.matcher import Scores, TowerMatcher
from dsmip.units.unit_scorer import CrossModalScorer, UnitScorer

ExpertName = Literal["text", "visual", "multimodal", "text_image", "image_text"]


class Reads(NamedTuple):
    """What an expert reads of mentions and of entities."""

    mentions: tuple[Modality, ...]
    entities: tuple[Modality, ...]

    @property
    def either(self) -> tuple[Modality, ...]:
        return tuple(dict.fromkeys((*self.mentions, *self.entities)))

    @property
    def is_cross_modal(self) -> bool:
        return self.mentions != self.entities


READS: Mapping[str, Reads] = {
    "text": Reads(("text",), ("text",)),
    "visual": Reads(("image",), ("image",)),
    "multimodal": Reads(("text", "image"), ("text", "image")),
    "text_image": Reads(("text",), ("image",)),
    "image_text": Reads(("image",), ("text",)),
}
_TOWERS: Mapping[Modality, TowerName] = {"text": "text", "image": "vision"}


class ExpertConfig(Frozen):
    """What an expert trains besides its units, and its prompts (the multimodal expert only; 0: none).

    Attributes:
        prompts_in: Both towers, as published, or the text tower alone, for vision towers that have no place for any.
    """

    added: ClassVar[Mapping[str, Any]] = {"prompts_in": "both"}

    tune: Tuning = "frozen"
    prompt_length: int = Field(0, ge=0)
    prompt_depth: int = Field(0, ge=0)
    prompts_in: Literal["both", "text"] = "both"

    @property
    def num_prompts(self) -> int:
        """Places that prompts take of a text: none without a layer to put them in."""
        return self.prompt_length if self.prompt_depth else 0


class ExpertEncoder(nn.Module):
    """The towers that an expert uses, with one set of prompts for mentions and one for entities.

    Attributes:
        mask_padding: True gives an item's own text tokens. False gives all places of the context, padded as in MIMIC.
    """

    def __init__(self, reads: Reads, config: ExpertConfig, backbone: BackboneConfig, *, mask_padding: bool) -> None:
        super().__init__()
        self.reads, self.mask_padding = reads, mask_padding
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(config.tune, [_TOWERS[modality] for modality in reads.either])
        vision_width = self.backbone.vision_width if config.prompts_in == "both" else None
        widths = (config.prompt_length, config.prompt_depth, self.backbone.text_width, vision_width)
        self.mention_prompts = InteractivePrompts(*widths)
        self.entity_prompts = InteractivePrompts(*widths)

    def train(self, mode: bool = True) -> "ExpertEncoder":
        """Towers always run in eval mode: they must give the same features twice (cached gradients)."""
        return super().train(False)

    def encode(self, batch: ItemBatch, modalities: Collection[Modality], prompts: InteractivePrompts) -> Table:
        """Features of N items: text_global [N, d_z], text_tokens, image_global [N, d_z], image_tokens (ragged)."""
        columns: dict[str, Tensor | Ragged] = {}
        if "text" in modalities:
            text = self._encode_text(batch, prompts)
            columns["text_global"] = text.pooled
            columns["text_tokens"] = Ragged.from_padded(text.tokens, text.mask if self.mask_padding else None)
        if "image" in modalities:
            pixels = self.backbone.normalise(batch.images, batch.has_image)
            image = self.backbone.encode_image(pixels, prompts if prompts.has_image_prompts else None)
            columns["image_global"] = image.pooled
            columns["image_tokens"] = Ragged.from_padded(image.tokens)
        return Table(columns)

    def _encode_text(self, batch: ItemBatch, prompts: InteractivePrompts) -> TokenFeatures:
        if self.mask_padding:
            return self.backbone.encode_text(batch.token_ids, batch.token_mask, prompts)
        length = self.backbone.context_length - prompts.num_prompts
        return self.backbone.encode_padded_text(batch.token_ids, batch.token_mask, length, prompts)


class Expert(TowerMatcher[ExpertEncoder]):
    """One of the experts.

    Its score is the mean of its units' (eqs. 9, 10, 14); the loss is in-batch contrastive (eq. 17).
    """

    features_name = "pooled and tokens 1"

    def __init__(self, scorer: UnitScorer | CrossModalScorer, encoder: ExpertEncoder | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.encoder = encoder

    @staticmethod
    def build(
        name: str,
        config: ExpertConfig,
        backbone: BackboneConfig,
        width: int,
        *,
        mask_padding: bool,
        with_encoder: bool,
    ) -> "Expert":
        """The expert of that name; its units have `width`.

        Raises:
            UserError: The backbone cannot be built.
        """
        reads, sizes = READS[name], feature_sizes(backbone.architecture)
        scorer: UnitScorer | CrossModalScorer
        if reads.is_cross_modal:
            scorer = CrossModalScorer(reads.mentions[0], reads.entities[0], sizes, width, mask_padding=mask_padding)
        else:
            scorer = UnitScorer(reads.mentions, sizes, width, mask_padding=mask_padding)
        if not with_encoder:
            return Expert(scorer)
        return Expert(scorer, ExpertEncoder(reads, config, backbone, mask_padding=mask_padding))

    def feature_settings(self) -> Mapping[str, float]:
        return {} if self._encoder().mask_padding else {"mask_padding": 0.0}

    def encode_mentions(self, batch: ItemBatch) -> Table:
        encoder = self._encoder()
        return encoder.encode(batch, encoder.reads.mentions, encoder.mention_prompts)

    def encode_entities(self, batch: ItemBatch) -> Table:
        encoder = self._encoder()
        return encoder.encode(batch, encoder.reads.entities, encoder.entity_prompts)

    def prepare_mentions(self, features: Table) -> Table:
        return self.scorer.prepare_mentions(features)

    def prepare_entities(self, features: Table) -> Table:
        return self.scorer.prepare_entities(features)

    @property
    def scores_tokens(self) -> bool:
        """Whether a unit of it compares tokens with tokens."""
        return self.scorer.scores_tokens

    def freeze_projections(self) -> None:
        """What maps pictures to the units' width trains no more (of units that have it)."""
        if isinstance(self.scorer, UnitScorer):
            for layer in self.scorer.projections():
                layer.requires_grad_(False)

    def score(
        self,
        mentions: Table,
        entities: Table,
        *,
        noise: Tensor | None = None,
        wanted_ME: Tensor | None = None,
    ) -> Scores:
        """Scores of prepared pairs: the mean of the units'.

        Args:
            wanted_ME: bool [M, E]; scores of other pairs lack the text unit's token-level half (None: all are whole).
        """
        units = self.scorer.score(mentions, entities, wanted_ME)
        return Scores(torch.stack(list(units.values())).mean(dim=0), parts=units)

    def image_columns(self, prepared: Table) -> list[str]:
        return self.scorer.image_columns(prepared)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        return self.scorer.global_vectors(prepared, side)

    def image_token_columns(self) -> Sequence[str]:
        return ("image_tokens",) if "image" in self._encoder().reads.either else ()
