"""The contract of everything that scores pairs: encode once per item, prepare once per item, score per pair.

    ItemBatch --encode--> features (Table) --prepare--> what a pair needs (Table) --score--> Scores [M, E]

Training and evaluation use the same `score`. Shapes: M mentions, E entities, B experts, N items.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.encoders.base import Side
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_keys import tower_form
from dsmip.errors import UserError
from dsmip.ops.experts.statistics import Survey
from dsmip.ops.losses import contrastive_loss

Encoder = TypeVar("Encoder", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of M x E pairs, higher is better.

    Attributes:
        total_ME: float [M, E].
        chosen_ME: int64 [M, E], index of the expert that scored the pair (None: no choice is made).
        parts: Named [M, E] scores that the total is made of (units or experts), for losses and reports. Where a choice
            is made and no gradient asked for, only the chosen part of a pair is computed, and the others hold 0.
        tied_choice_ME: bool [M, E], True where another expert was as good a choice; None: not asked, or no choice is
            made.
        token_pairs_M2: int64 [M, 2], how many token-level scores, the costly ones, were computed, and how many all
            parts together have; None: all were computed.
    """

    total_ME: Tensor
    chosen_ME: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    tied_choice_ME: Tensor | None = None
    token_pairs_M2: Tensor | None = None

    def broken_part(self, mention: int, entity: int) -> str | None:
        """The first part whose score of a pair is NaN or infinite; where all are sound, the gate if there is one."""
        for name, part_ME in self.parts.items():
            if not math.isfinite(float(part_ME[mention, entity])):
                return name
        return "gate" if self.parts and self.chosen_ME is not None else None


def token_pairs(computed: Sequence[Tensor]) -> Tensor:
    """`Scores.token_pairs_M2` from which pairs were computed, bool [M, E] for each part that scores tokens."""
    computed_PME = torch.stack(list(computed))
    computed_M = computed_PME.sum(dim=(0, 2))
    return torch.stack([computed_M, torch.full_like(computed_M, len(computed) * computed_PME.shape[2])], dim=1)


@dataclass(frozen=True, slots=True)
class BatchGold:
    """Which entity column is right, and which columns must not count as negatives.

    Attributes:
        column_M: int64 [M], gold column of each mention.
        same_ME: bool [M, E], True where the entity is the mention's gold in another column (the same entity drawn for
            another mention).
    """

    column_M: Tensor
    same_ME: Tensor

    @staticmethod
    def from_rows(gold_row_M: Tensor, entity_row_E: Tensor, column_M: Tensor) -> "BatchGold":
        """From kb rows of the mentions' golds and of the columns."""
        same_ME = gold_row_M[:, None] == entity_row_E[None, :]
        same_ME[torch.arange(len(gold_row_M), device=same_ME.device), column_M] = False
        return BatchGold(column_M, same_ME)


@dataclass(frozen=True, slots=True)
class PairedItems:
    """A batch as it is read, beside what its towers said of it: for losses that need tokens and pictures.

    Attributes:
        mentions, entities: M and E items.
        mention_features, entity_features: Theirs, without gradient.
        gold: Of the mentions among these entities.
        seed: Of all that is drawn, for the whole batch at once: a mention's draws do not depend on the others' number.
    """

    mentions: ItemBatch
    entities: ItemBatch
    mention_features: Table
    entity_features: Table
    gold: BatchGold
    seed: int


@dataclass(frozen=True, slots=True)
class FixedBatches:
    """How many items are prepared at a time, in the order of the split and of the kb.

    Attributes:
        mentions, entities: How many of each side.
        reason: Which setting makes prepared items depend on each other.
    """

    mentions: int
    entities: int
    reason: str


class Part(nn.Module):
    """What is trained on its own: a matcher or a re-ranker, with its pretrained towers."""

    def pretrained_towers(self) -> Sequence[nn.Module]:
        """Its modules whose weights come pretrained: every `Backbone`. A part with other towers names them here.

        They have a learning rate of their own (`train.tower_learning_rate`), and what is frozen of them is in no
        checkpoint.
        """
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def tower_tensors(self) -> set[str]:
        """Names of the parameters and buffers of `pretrained_towers`, as in `state_dict`."""
        owned = {id(tensor) for tower in self.pretrained_towers() for tensor in _tensors(tower).values()}
        return {name for name, tensor in _tensors(self).items() if id(tensor) in owned}


class Reranker(Part, ABC):
    """Scores a mention and an entity together, over what a matcher ranks best: dear, and not to be indexed."""

    def start_from(self, first_stage: "Matcher") -> None:
        """Takes over what its finished first stage has learned, before it is trained itself: here, nothing."""

    @abstractmethod
    def score_pairs(self, mentions: ItemBatch, entities: ItemBatch, mention_P: Tensor, entity_P: Tensor) -> Tensor:
        """Scores of pairs, float [P], higher is better; a pair's score depends on the pair alone.

        Args:
            mention_P, entity_P: Rows of the batches, int64 [P].
        """

    def forward(self, mentions: ItemBatch, entities: ItemBatch, entity_MK: Tensor) -> Tensor:
        """Training loss summed over the M mentions: -log softmax of the first of a mention's entities among its own.

        Args:
            entity_MK: Rows of the entities, int64 [M, K], the gold first; -1 where there are fewer.
        """
        mention_P, column_P = (entity_MK >= 0).nonzero(as_tuple=True)
        score_P = self.score_pairs(mentions, entities, mention_P, entity_MK[mention_P, column_P])
        score_MK = score_P.new_full(entity_MK.shape, -torch.inf).index_put((mention_P, column_P), score_P)
        return -score_MK.log_softmax(dim=1)[:, 0].sum()


class Matcher(Part, ABC):
    """A trainable scorer of mention-entity pairs (a whole system or one of its parts)."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses what was the loss once, and would never be called.

        Raises:
            TypeError: The class has a `forward` of its own.
        """
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.forward: a matcher's loss is its `loss`, of prepared items")

    @abstractmethod
    def encode_mentions(self, batch: ItemBatch) -> Table:
        """Features of N mentions (towers run here, under autocast where configured; outputs are float32)."""

    @abstractmethod
    def encode_entities(self, batch: ItemBatch) -> Table:
        """Features of N entities."""

    @abstractmethod
    def prepare_mentions(self, features: Table) -> Table:
        """All that a pair needs of a mention, computed once; row n depends on features of row n alone."""

    @abstractmethod
    def prepare_entities(self, features: Table) -> Table:
        """All that a pair needs of an entity, computed once; row n depends on features of row n alone."""

    def image_columns(self, prepared: Table) -> list[str]:
        """Columns of prepared entities that depend on the picture alone: without one, entities share them."""
        return []

    @abstractmethod
    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        """Scores of prepared mentions [M] against prepared entities [E].

        Args:
            noise: Gumbel noise [M, E, B] while a gate is trained; None chooses without noise.
        """

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """Float [N, g] of prepared items: a mention's dot product with an entity stands for their score in a search.

        It holds all of the score that is a dot product of one vector per item; every unit says what it leaves out.
        Token rows (ragged columns) are not read. For candidates alone: no score and no rank is made from it.

        Raises:
            UserError: This matcher has none.
        """
        raise UserError(f"{type(self).__name__} has no global vectors: candidates cannot be searched with it")

    def loss_mentions(self, features: Table) -> Table:
        """What the loss needs of mentions: prepared ones, with more columns where a loss has more terms than scores."""
        return self.prepare_mentions(features)

    def loss_entities(self, features: Table) -> Table:
        """What the loss needs of entities, by the rule of rows that `prepare_entities` has.

        With several workers each computes this of its own share, and all have the rows of all.
        """
        return self.prepare_entities(features)

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """Training loss summed over the M mentions (a scalar), of `loss_mentions` and `loss_entities`: eq. 17."""
        return contrastive_loss(self.score(mentions, entities).total_ME, gold.column_M, gold.same_ME)

    def forward(self, mention_features: Table, entity_features: Table, gold: BatchGold) -> Tensor:
        """The loss from features."""
        return self.loss(self.loss_mentions(mention_features), self.loss_entities(entity_features), gold)

    @property
    def reads_items(self) -> bool:
        """True when there is an `item_loss`: it then trains on items, not on cached features."""
        return False

    def item_loss(self, batch: PairedItems, rows: slice) -> Tensor:
        """What is added to the loss of the mentions in `rows`, summed over them: matching, masked tokens.

        It is asked for some mentions after the others where memory is short (`train.micro_batch_size`), and encodes
        what it needs. With several workers a batch is each worker's own share.
        """
        raise RuntimeError(f"{type(self).__name__} has no loss of items")

    def surveyed(self) -> Mapping[str, tuple["Matcher", float]]:
        """Experts whose scores against the whole kb must be known before a pair is scored, each with its scale.

        A matcher that has some scores only mentions that are `informed`; `dsmip.evaluation.experts.survey` does it.
        """
        return {}

    def informed(self, mentions: Table, survey: Survey) -> Table:
        """Prepared mentions with what scoring needs of their survey, the same whatever the tile."""
        return mentions

    def fused(self, mentions: Table, scores: Mapping[str, Tensor]) -> Scores:
        """Scores of mentions that are `informed`, from those of all `surveyed` experts [M, E], without their scales."""
        raise RuntimeError(f"{type(self).__name__} fuses no experts")

    def part_scores(self, mentions: Table, entities: Table) -> Mapping[str, Tensor]:
        """Scores [M, E] by name of all experts or units that a score is made of, also where one is chosen: to be shown.

        Empty where there is one part alone.
        """
        return self.score(mentions, entities).parts

    def fixed_batches(self) -> FixedBatches | None:
        """In which batches items must be prepared, where what they become depends on each other; None: it does not.

        A matcher that has some ranks whole splits against the whole kb, as its release does; it is neither trained nor
        linked with.
        """
        return None

    @property
    def loss_is_of_whole_batch(self) -> bool:
        """True when a mention's loss depends on the batch's other mentions, not only on its columns.

        With several workers it then is of each worker's own share of the mentions.
        """
        return False

    @abstractmethod
    def encoder_trains(self) -> bool:
        """True when encode_* has trainable parameters: features then change during training and cannot be cached."""

    def encoder_state(self) -> Mapping[str, Tensor]:
        """The tensors that features depend on (their hash keys the feature cache)."""
        return self.state_dict()

    def image_token_columns(self) -> Sequence[str]:
        """Ragged columns of its features that depend on the picture alone: stored once for all items without one.

        One side's features may lack some of them.
        """
        return ()

    def shared_form(self) -> str | None:
        """See `FeatureEncoder.shared_form`."""
        return None


class TowerMatcher(Matcher, Generic[Encoder]):
    """A matcher with towers of its own.

    Attributes:
        encoder: The towers; None: it was built without them and scores cached features.
        features_name: What its encoder makes of its backbones, for other runs and systems whose encoder makes the same
            (`dsmip.encoders.feature_keys.tower_form`): it changes when the features do. None: they are not shared.
    """

    features_name: ClassVar[str | None] = None
    encoder: Encoder | None

    def encoder_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self._encoder().parameters())

    def encoder_state(self) -> Mapping[str, Tensor]:
        settings = {name: torch.tensor(value) for name, value in self.feature_settings().items()}
        return {**self._encoder().state_dict(), **settings}

    def shared_form(self) -> str | None:
        if self.features_name is None or self.encoder_trains():
            return None
        return tower_form(self.features_name, self._encoder())

    def feature_settings(self) -> Mapping[str, float]:
        """What features depend on besides the towers' tensors and the item format, where it is not the default.

        A default has no entry: features of earlier caches, whose keys knew none, stay found.
        """
        return {}

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise RuntimeError("this matcher was built without towers: it scores cached features only")
        return self.encoder


class VectorMatcher(TowerMatcher[Encoder]):
    """A matcher of one vector per item, the prepared column `vector`: a pair's score is the product of its two."""

    def encode_mentions(self, batch: ItemBatch) -> Table:
        features: Table = self._encoder()(batch)
        return features

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self.encode_mentions(batch)

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        return Scores(mentions.dense("vector") @ entities.dense("vector").T)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The vectors themselves: their product is the score, and nothing is left out."""
        return prepared.dense("vector")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; one that has two names is under both."""
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return dict(itertools.chain(*named))
