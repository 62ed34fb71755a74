"""DZMNED (Moon et al., ACL 2018): attention over an item's word, sentence and picture, against an entity's vector.

The attention weighs whole modalities, so that a missing or poor one counts for little. Decisions of ours: word vectors
are the input embeddings of the backbone's text tower (published: words and characters of their own), a picture's vector
is its vision tower's; an entity has the same three (name, attributes, picture) in place of the published embedding of
its node in a graph, through maps of its own; vectors are compared by their cosine, and the hinge loss takes the mean
over a batch's other entities.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.images import PixelForm
from dsmip.data.table import Ragged, Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureSizes, feature_sizes
from dsmip.encoders.clip import Backbone
from dsmip.models.base import OnePartSystem
from dsmip.ops.losses import triplet_losses
from dsmip.units.matcher import BatchGold, VectorMatcher

WORD = "word"
"""The item's own name, beside its sentence or attributes."""
_NAMES = Template(mention="{word}", entity="{name}")


class DzmnedConfig(Frozen):
    """The `system` section.

    Attributes:
        width: Of the space in which modalities are weighed and items compared.
        margin: Between the cosines of a gold and of a negative.
        pixels: How pictures become squares; null: as the backbone's weights expect it.
        template: Of sentence and attributes; the name is read apart.
    """

    tune: Literal["frozen", "full"] = "frozen"
    width: int = Field(512, ge=2, multiple_of=2)
    margin: float = Field(0.2, gt=0)
    pixels: PixelForm | None = None
    template: Template = Template(mention="{sentence}", entity="{attributes}")


class ModalityEncoder(nn.Module):
    """Word embeddings and the vision tower of a backbone, the same for mentions and entities."""

    def __init__(self, backbone: BackboneConfig, tune: Literal["frozen", "full"]) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune)

    def forward(self, batch: ItemBatch) -> Table:
        """`word` [N, d_t], the mean of its name's embeddings, `text` ragged [., d_t], `image` [N, d_z], `has_image`."""
        pixels = self.backbone.normalise(batch.images, batch.has_image)
        word_Nt = self.backbone.token_embedding_mean(batch.extras[f"{WORD}_ids"], batch.extras[f"{WORD}_mask"])
        text_NLt = self.backbone.text.embedding(batch.token_ids).float()
        image_Nz = F.normalize(self.backbone.encode_image(pixels).pooled, dim=-1) * batch.has_image[:, None]
        return Table(
            {
                "word": word_Nt,
                "text": Ragged.from_padded(text_NLt, batch.token_mask),
                "image": image_Nz,
                "has_image": batch.has_image.float()[:, None],
            }
        )


class ModalityAttention(nn.Module):
    """One side's vector of its three modalities (word, sentence by a BiLSTM, picture), each weighed by attention."""

    def __init__(self, sizes: FeatureSizes, width: int) -> None:
        super().__init__()
        self.word = nn.Linear(sizes.text_width, width)
        self.text = nn.LSTM(sizes.text_width, width // 2, batch_first=True, bidirectional=True)
        self.image = nn.Linear(sizes.embed_width, width)
        self.attention = nn.Linear(3 * width, 3)

    def forward(self, features: Table) -> Tensor:
        """Float [N, width] of length one."""
        text_NLt, mask_NL = features.ragged("text").padded()
        if not len(text_NLt):  # of a worker's empty share; a sequence of nothing cannot be packed
            return F.normalize(self.word(features.dense("word")), dim=-1)
        packed = pack_padded_sequence(text_NLt, mask_NL.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
        _, (last_2Nh, _) = self.text(packed)
        word_Nd, image_Nd = self.word(features.dense("word")), self.image(features.dense("image"))
        each_N3d = torch.stack([word_Nd, torch.cat(list(last_2Nh), dim=-1), image_Nd], dim=1).tanh()
        logits_N3 = self.attention(each_N3d.flatten(1))
        lacking_N3 = F.pad(features.dense("has_image") == 0, (2, 0))  # word and sentence are always there
        share_N3 = logits_N3.masked_fill(lacking_N3, -torch.inf).softmax(dim=-1)
        return F.normalize((share_N3[..., None] * each_N3d).sum(dim=1), dim=-1)


class DzmnedMatcher(VectorMatcher[ModalityEncoder]):
    """Cosines of attended vectors; without an encoder it scores cached features."""

    features_name = "words, tokens and pooled image 1"

    def __init__(self, config: DzmnedConfig, sizes: FeatureSizes, encoder: ModalityEncoder | None = None) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.mentions = ModalityAttention(sizes, config.width)
        self.entities = ModalityAttention(sizes, config.width)

    def prepare_mentions(self, features: Table) -> Table:
        return Table({"vector": self.mentions(features)})

    def prepare_entities(self, features: Table) -> Table:
        return Table({"vector": self.entities(features)})

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        scores_ME = self.score(mentions, entities).total_ME
        return triplet_losses(scores_ME, gold.column_M, gold.same_ME, margin=self.config.margin, hardest=False).sum()


class Dzmned(OnePartSystem):
    """How DZMNED is built: one part, which is the whole system."""

    name: ClassVar[str] = "dzmned"
    paper: ClassVar[str] = "Moon et al., ACL 2018"
    published_config: ClassVar[str] = "dzmned_wikimel"
    config_class: ClassVar[type[Frozen]] = DzmnedConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        return ItemFormat(section.template, pixels=section.pixels, texts=((WORD, _NAMES),))

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> DzmnedMatcher:
        section: DzmnedConfig = config.system
        encoder = ModalityEncoder(config.backbone, section.tune) if with_encoder else None
        return DzmnedMatcher(section, feature_sizes(config.backbone.architecture), encoder)
