"""BERT (Devlin et al., 2019) as a linker: a bi-encoder of texts alone, one vector of an item's text.

Decisions of ours, as papers that report BERT are silent: one encoder reads mentions and entities, an item's vector is
that of the text's first token, the score is a product, and the loss contrasts a batch's mentions with their golds.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import BackboneConfig, ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.errors import UserError
from dsmip.models.base import OnePartSystem
from dsmip.units.matcher import VectorMatcher

Pooling = Literal["first", "tower"]
AnyPooling = Literal["first", "tower", "word"]
_POOLED = {"tower": "as_tower", "word": "word"}  # words of a key
_LOG_SCALE = 2.9957  # of cosines at the start, log(20)
_HIGHEST = 4.6052  # log(100)


class BertConfig(Frozen):
    """The `system` section.

    Attributes:
        tune: frozen is zero-shot.
        pooling: The vector of the first token ([CLS]), what the tower pools as its authors do (a mean, mostly), or the
            mean of the tokens of a mention's word in its sentence, and of an entity's name.
        similarity: A product, or a cosine times a learned factor.
        markers: Tokens of the vocabulary that the template writes out.
    """

    tune: Tuning = "full"
    pooling: AnyPooling = "first"
    similarity: Literal["product", "cosine"] = "product"
    template: Template = Template(mention="{word} [SEP] {sentence}", entity="{name} [SEP] {attributes}")
    markers: tuple[str, ...] = ("[SEP]",)


class TextEncoder(nn.Module):
    """A text tower that gives one vector per text, `text` [N, d]: d_z of what the tower pools, else d_t of tokens."""

    def __init__(self, backbone: BackboneConfig, tune: Tuning, pooling: AnyPooling) -> None:
        super().__init__()
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        self.backbone.tune(tune, ["text"])
        if pooling != "tower":  # tokens do not go through it
            for parameter in self.backbone.text.projection:
                parameter.requires_grad_(False)
        self.pooling = pooling

    def feature_settings(self) -> Mapping[str, float]:
        """See `TowerMatcher.feature_settings`."""
        return {} if self.pooling == "first" else {f"pools_{_POOLED[self.pooling]}": 1.0}

    def forward(self, batch: ItemBatch) -> Table:
        """Features of N items."""
        found = self.backbone.encode_text(batch.token_ids, batch.token_mask)
        if self.pooling == "word":
            return Table({"text": _mean_of_word(found.tokens, batch.extras["word_places"])})
        return Table({"text": found.tokens[:, 0] if self.pooling == "first" else found.pooled})


def _mean_of_word(tokens_NLd: Tensor, places_NP: Tensor) -> Tensor:
    """[N, d]; of an item whose word was cut off, its first token."""
    places_NL = F.pad(places_NP, (0, tokens_NLd.shape[1] - places_NP.shape[1]))
    is_first_L = torch.arange(places_NL.shape[1], device=places_NL.device) == 0
    places_NL = torch.where(places_NL.any(dim=1, keepdim=True), places_NL, is_first_L)
    return (tokens_NLd * places_NL[..., None]).sum(dim=1) / places_NL.sum(dim=1, keepdim=True)


class BertMatcher(VectorMatcher[TextEncoder]):
    """Products of text vectors; without an encoder it scores cached features."""

    features_name = "text vector 1"

    def __init__(self, config: BertConfig, encoder: TextEncoder | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.log_scale: nn.Parameter | None = None
        if config.similarity == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(_LOG_SCALE), requires_grad=config.tune != "frozen")

    def feature_settings(self) -> Mapping[str, float]:
        return self._encoder().feature_settings()

    def prepare_mentions(self, features: Table) -> Table:
        """The scale is a mention's: an index of entities does not depend on it."""
        vector_Nd = self._vector(features)
        scale = 1.0 if self.log_scale is None else self.log_scale.clamp(max=_HIGHEST).exp()
        return Table({"vector": vector_Nd * scale})

    def prepare_entities(self, features: Table) -> Table:
        return Table({"vector": self._vector(features)})

    def _vector(self, features: Table) -> Tensor:
        text_Nd = features.dense("text")
        return text_Nd if self.log_scale is None else F.normalize(text_Nd, dim=-1)


def check_first_token(pooling: AnyPooling, config: ExperimentConfig, backbone: Backbone) -> None:
    """Checks that a text's first token says something of it, where it is what is pooled.

    Raises:
        UserError: The tower is causal.
    """
    if pooling == "first" and backbone.text.is_causal:
        raise UserError(
            f"system.pooling: first: the first token of {config.backbone.architecture} sees no other one; take "
            "pooling: tower, or a text tower such as backbone.text: hf:bert-base-uncased"
        )


class Bert(OnePartSystem):
    """How BERT is built: one part, which is the whole system."""

    name: ClassVar[str] = "bert"
    paper: ClassVar[str] = "Devlin et al., NAACL 2019"
    published_config: ClassVar[str] = "bert_wikimel"
    config_class: ClassVar[type[Frozen]] = BertConfig

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        words = section.pooling == "word"
        return ItemFormat(section.template, modalities=("text",), markers=section.markers, word_places=words)

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        super().check(config, backbone)
        check_first_token(config.system.pooling, config, backbone)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> BertMatcher:
        section: BertConfig = config.system
        encoder = TextEncoder(config.backbone, section.tune, section.pooling) if with_encoder else None
        return BertMatcher(section, encoder)
