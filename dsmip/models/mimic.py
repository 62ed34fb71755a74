"""MIMIC (Luo et al., KDD 2023): one CLIP for both sides, fine-tuned whole, and the mean of three matching units.

Follows the published code where it says more than the paper: pooled features have length one, texts are padded with
end-of-text to a fixed number of tokens, the tower hides padding from attention and the text unit does not. One decision
of ours: pairs with the same gold are no negatives, as in all systems here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.table import Ragged, Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureEncoder, Side, feature_sizes
from dsmip.encoders.clip import Backbone, Tuning, padded_with_end
from dsmip.encoders.hugging_face import open_clip_names
from dsmip.encoders.weights import check_fit, load_weights
from dsmip.errors import UserError
from dsmip.models.base import System
from dsmip.ops.losses import contrastive_loss
from dsmip.units.matcher import BatchGold, Matcher, Scores
from dsmip.units.unit_scorer import UnitScorer

# Where the scorer's parameters are in a published state dict (beginnings of names).
_PUBLISHED = {
    "units.text.": "matcher.tglu.",
    "units.image.": "matcher.vdlu.",
    "units.cross.": "matcher.cmfu.",
    "text_norm.": "matcher.",
    "picture_norm.image_cls_fc.": "encoder.image_cls_fc.",
    "picture_norm.image_tokens_fc.": "encoder.image_tokens_fc.",
    "picture_norm.": "matcher.",
}
_PUBLISHED_CLIP = "encoder.clip."


class MimicConfig(Frozen):
    """The `system` section.

    Attributes:
        num_tokens: Every text is cut or padded to this length.
        mask_padding: Whether the text unit ignores padding; the published model does not.
    """

    tune: Tuning = "full"
    width: int = Field(96, ge=1)
    num_tokens: int = Field(40, ge=3)
    mask_padding: bool = False
    template: Template = Template(mention="{word} [SEP] {sentence}", entity="{name} [SEP] {attributes}")


class MimicEncoder(nn.Module):
    """Both CLIP towers, the same for mentions and entities."""

    def __init__(self, config: MimicConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(config.tune)
        self.num_tokens, self.mask_padding = config.num_tokens, config.mask_padding
        if self.num_tokens > self.backbone.context_length:
            raise UserError(
                f"system.num_tokens {self.num_tokens} exceeds the context length {self.backbone.context_length} of "
                f"{backbone.architecture}"
            )

    def train(self, mode: bool = True) -> "MimicEncoder":
        """Towers always run in eval mode: they must give the same features twice (cached gradients)."""
        return super().train(False)

    def forward(self, batch: ItemBatch) -> Table:
        """Features of N items: text_global and image_global [N, d_z] of length one, text_tokens, image_tokens (ragged).

        Raises:
            ValueError: a text of more than `num_tokens` tokens.
        """
        text = self.backbone.encode_text(padded_with_end(batch.token_ids, self.num_tokens), hide_padding=True)
        image = self.backbone.encode_image(self.backbone.normalise(batch.images, batch.has_image))
        return Table(
            {
                "text_global": F.normalize(text.pooled, dim=-1),
                "text_tokens": Ragged.from_padded(text.tokens, text.mask if self.mask_padding else None),
                "image_global": F.normalize(image.pooled, dim=-1),
                "image_tokens": Ragged.from_padded(image.tokens),
            }
        )


class MimicMatcher(Matcher):
    """The three units over one encoder; without an encoder it scores cached features."""

    def __init__(self, scorer: UnitScorer, encoder: MimicEncoder | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.encoder = encoder

    def encode_mentions(self, batch: ItemBatch) -> Table:
        features: Table = self._encoder()(batch)
        return features

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self.encode_mentions(batch)

    def prepare_mentions(self, features: Table) -> Table:
        return self.scorer.prepare_mentions(features)

    def prepare_entities(self, features: Table) -> Table:
        return self.scorer.prepare_entities(features)

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        """(S_T + S_V + S_C) / 3, with `parts` text, image and cross."""
        units = self.scorer.score(mentions, entities)
        return Scores((units["text"] + units["image"] + units["cross"]) / 3, parts=units)

    def image_columns(self, prepared: Table) -> list[str]:
        return self.scorer.image_columns(prepared)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        return self.scorer.global_vectors(prepared, side)

    def forward(self, mention_features: Table, entity_features: Table, gold: BatchGold) -> Tensor:
        """Sum of four contrastive losses: of the total and of each unit alone."""
        scores = self.score(self.prepare_mentions(mention_features), self.prepare_entities(entity_features))
        loss = contrastive_loss(scores.total_ME, gold.column_M, gold.same_ME)
        for unit_ME in scores.parts.values():
            loss = loss + contrastive_loss(unit_ME, gold.column_M, gold.same_ME)
        return loss

    def encoder_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self._encoder().parameters())

    def encoder_state(self) -> Mapping[str, Tensor]:
        return self._encoder().state_dict()

    def load_published_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a released checkpoint's tensors (read a file with `dsmip.encoders.weights.read_weights`).

        Args:
            state: The published names `matcher.*` and `encoder.*`, with a Hugging Face CLIPModel under
                `encoder.clip.*`; a matcher without encoder passes the latter over. Nothing is loaded unless all of it
                fits.

        Raises:
            UserError: a tensor is missing, unknown or of another shape; the first one is named as published.
        """
        units = {name: tensor for name, tensor in state.items() if not name.startswith(_PUBLISHED_CLIP)}
        own_names = {_published_name(name): name for name in self.scorer.state_dict()}
        own = self.scorer.state_dict()
        check_fit(units, {published: own[name] for published, name in own_names.items()}, "of MIMIC")
        if self.encoder is not None:
            clip = {name.removeprefix(_PUBLISHED_CLIP): state[name] for name in state.keys() - units.keys()}
            load_weights(self.encoder.backbone.clip, open_clip_names(clip), f"of MIMIC ({_PUBLISHED_CLIP}*)")
        self.scorer.load_state_dict({own_names[published]: tensor for published, tensor in units.items()})

    def _encoder(self) -> MimicEncoder:
        if self.encoder is None:
            raise RuntimeError("this matcher was built without towers: it scores cached features only")
        return self.encoder


class Mimic(System):
    """How MIMIC is built: one part, which is the whole system."""

    name: ClassVar[str] = "mimic"
    config_class: ClassVar[type[Frozen]] = MimicConfig
    gated: ClassVar[bool] = False

    @classmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        return (cls.name,)

    @classmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        return (cls.name,)

    @classmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        return ()

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, num_tokens=section.num_tokens)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> MimicMatcher:
        section, sizes = config.system, feature_sizes(config.backbone.architecture)
        scorer = UnitScorer(("text", "image"), sizes, section.width, mask_padding=section.mask_padding)
        return MimicMatcher(scorer, MimicEncoder(section, config.backbone) if with_encoder else None)

    @classmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        return cls.build_part(part, config, with_encoder=True)

    @classmethod
    def build_whole(cls, config: ExperimentConfig) -> MimicMatcher:
        """The part without its towers: it scores the part's features as they are, without a prefix."""
        return cls.build_part(cls.name, config, with_encoder=False)


def _published_name(name: str) -> str:
    start = next(start for start in _PUBLISHED if name.startswith(start))
    return _PUBLISHED[start] + name.removeprefix(start)
