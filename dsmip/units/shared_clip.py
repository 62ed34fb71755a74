"""One CLIP for mentions and entities, fine-tuned whole, under the mean of matching units: MIMIC, M3EL and MMoE.

Follows the published code of the three: pooled features have length one, texts are padded with end-of-text to a fixed
number of tokens, and the tower hides padding from attention. One decision of ours: pairs with the same gold are no
negatives, as in all systems here.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.encoders.formats.hugging_face_clip import open_clip_names
from dsmip.encoders.weights import check_fit, load_weights
from dsmip.errors import UserError
from dsmip.ops.losses import contrastive_loss
from dsmip.units.matcher import BatchGold, Scores, TowerMatcher
from dsmip.units.unit_scorer import UnitScorer

PUBLISHED_NORMS: Mapping[str, str] = {
    "text_norm.": "matcher.",
    "picture_norm.image_cls_fc.": "encoder.image_cls_fc.",
    "picture_norm.image_tokens_fc.": "encoder.image_tokens_fc.",
    "picture_norm.": "matcher.",
}
"""Where norms and projections are in a published state dict (beginnings of names, the first that fits)."""
_PUBLISHED_CLIP = "encoder.clip."


class SharedClipEncoder(nn.Module):
    """Both CLIP towers, the same for mentions and entities.

    Attributes:
        num_tokens: Every text is padded to this length.
        mask_padding: Whether features hold an item's own text tokens alone.
    """

    def __init__(self, backbone: BackboneConfig, tune: Tuning, num_tokens: int, *, mask_padding: bool) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune)
        self.num_tokens, self.mask_padding = num_tokens, mask_padding
        if num_tokens > self.backbone.context_length:
            raise UserError(
                f"system.num_tokens {num_tokens} exceeds the context length {self.backbone.context_length} of "
                f"{backbone.architecture}"
            )

    def train(self, mode: bool = True) -> "SharedClipEncoder":
        """Towers always run in eval mode: they must give the same features twice (cached gradients)."""
        return super().train(False)

    def forward(self, batch: ItemBatch) -> Table:
        """Features of N items: text_global and image_global [N, d_z] of length one, text_tokens, image_tokens (ragged).

        Raises:
            ValueError: a text of more than `num_tokens` tokens.
        """
        text = self.backbone.encode_padded_text(batch.token_ids, batch.token_mask, self.num_tokens)
        image = self.backbone.encode_image(self.backbone.normalise(batch.images, batch.has_image))
        return Table(
            {
                "text_global": F.normalize(text.pooled, dim=-1),
                "text_tokens": Ragged.from_padded(text.tokens, text.mask if self.mask_padding else None),
                "image_global": F.normalize(image.pooled, dim=-1),
                "image_tokens": Ragged.from_padded(image.tokens),
            }
        )


class SharedClipMatcher(TowerMatcher[SharedClipEncoder]):
    """Matching units over one encoder; without an encoder it scores cached features.

    Attributes:
        title: The system's name for people.
        published_units: Where the units' parameters are in a published state dict: beginnings of names, the first that
            fits. Norms and projections are where all three systems have them.
        passed_over: Beginnings of published names that take no part in any score.
    """

    features_name = "normalised pooled and tokens 1"
    title: ClassVar[str]
    published_units: Mapping[str, str]
    passed_over: tuple[str, ...] = ()

    def __init__(self, scorer: UnitScorer, encoder: SharedClipEncoder | None = None) -> None:
        super().__init__()
        self.scorer = scorer
        self.encoder = encoder

    def feature_settings(self) -> Mapping[str, float]:
        return {"mask_padding": 1.0} if self._encoder().mask_padding else {}

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
        """The mean of the units' scores, which are the `parts`."""
        units = self.scorer.score(mentions, entities)
        return Scores(reduce(add, units.values()) / len(units), parts=units)

    def image_columns(self, prepared: Table) -> list[str]:
        return self.scorer.image_columns(prepared)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        return self.scorer.global_vectors(prepared, side)

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """Sum of contrastive losses: of the total and of each unit's score alone."""
        scores = self.score(mentions, entities)
        loss = contrastive_loss(scores.total_ME, gold.column_M, gold.same_ME)
        for unit_ME in scores.parts.values():
            loss = loss + contrastive_loss(unit_ME, gold.column_M, gold.same_ME)
        return loss

    def image_token_columns(self) -> Sequence[str]:
        return ("image_tokens",)

    def load_published_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a released checkpoint's tensors (read a file with `dsmip.encoders.weights.read_weights`).

        Args:
            state: The published names `matcher.*` and `encoder.*`, with a Hugging Face CLIPModel under
                `encoder.clip.*`; a matcher without encoder passes the latter over. Nothing is loaded unless all of it
                fits.

        Raises:
            UserError: a tensor is missing, unknown or of another shape; the first one is named as published.
        """
        skipped = (_PUBLISHED_CLIP, *self.passed_over)
        units = {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}
        own = self.scorer.state_dict()
        own_names = {self._published_name(name): name for name in own}
        check_fit(units, {published: own[name] for published, name in own_names.items()}, f"of {self.title}")
        if self.encoder is not None:
            clip = {n.removeprefix(_PUBLISHED_CLIP): t for n, t in state.items() if n.startswith(_PUBLISHED_CLIP)}
            label = f"of {self.title} ({_PUBLISHED_CLIP}*)"
            load_weights(self.encoder.backbone.clip, open_clip_names(clip), label)
        self.scorer.load_state_dict({own_names[published]: tensor for published, tensor in units.items()})

    def _published_name(self, name: str) -> str:
        starts = {**self.published_units, **PUBLISHED_NORMS}
        start = next(start for start in starts if name.startswith(start))
        return starts[start] + name.removeprefix(start)
