"""Validation while a model trains: metrics over the whole kb, and hard negatives from the same index.

Every worker prepares and ranks against its own slice of the kb.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsmip import distributed
from dsmip.data.collate import Collator, gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.evaluation.hard_negatives import hard_negatives
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_entities, prepare_in_tiles, prepare_split
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.training.loop import Context
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import use_backend

Mentions = Literal["validation", "train"]


@dataclass(frozen=True)
class SplitFeatures:
    """Features of one split's mentions with their golds."""

    mentions: Table
    gold_row_M: Tensor


class Validation(ABC):
    """Ranks the validation mentions, and finds hard negatives of the training mentions.

    Args:
        gold_row_M: Of the validation mentions, kb rows int64 [M].
        num_entities: Of the kb.
    """

    def __init__(self, gold_row_M: Tensor, num_entities: int, context: Context) -> None:
        self._gold_row_M, self._context = gold_row_M, context
        rank, world = distributed.rank(), distributed.world_size()
        self._rows = range(num_entities * rank // world, num_entities * (rank + 1) // world)
        self._fresh: Table | None = None

    @abstractmethod
    def prepared_entities(self, matcher: Matcher) -> Table:
        """Of this worker's slice."""

    @abstractmethod
    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        """Of a split; of training mentions, those that are trained on."""

    def __call__(self, matcher: Matcher) -> Mapping[str, float]:
        """Metrics, and how many pairs are too close for single precision to order them (for the records alone)."""
        matcher.eval()
        device = self._context.device
        self._fresh = entities = self.prepared_entities(matcher)
        mentions = self.prepared_mentions(matcher, "validation")
        use_backend(matcher, "auto", device)
        model = RankedModel(matcher, mentions, EntityIndex([entities], self._rows.start), self._gold_row_M)
        ranking = rank_unrefined(model, device, after_tile=lambda _: self._context.alive())
        return ranking.metrics() | (ranking.cost.unrefined.metrics() if ranking.cost.unrefined else {})

    def hard_negatives(self, matcher: Matcher, gold_row_N: Tensor, group_E: Tensor, k: int) -> Tensor:
        """kb rows int64 [N, k] for each training mention, from the index of the validation just before, if any.

        Args:
            gold_row_N: kb rows of the training mentions' golds.
            group_E: See `dsmip.evaluation.hard_negatives`.
        """
        matcher.eval()
        entities = self.prepared_entities(matcher) if self._fresh is None else self._fresh
        self._fresh = None  # the weights change from here on
        mentions, device = self.prepared_mentions(matcher, "train"), self._context.device
        use_backend(matcher, "auto", device)
        index = EntityIndex([entities], self._rows.start)
        return hard_negatives(matcher, mentions, index, gold_row_N, group_E, k, device, lambda _: self._context.alive())


class CachedValidation(Validation):
    """From cached features.

    Args:
        kb: Features of the whole kb `with_has_image`.
        training: Features of the training mentions; needed for hard negatives alone.
    """

    def __init__(self, validation: SplitFeatures, kb: Table, context: Context, training: Table | None = None) -> None:
        super().__init__(validation.gold_row_M, len(kb), context)
        self._features, self._kb = {"validation": validation.mentions, "train": training}, kb

    def prepared_entities(self, matcher: Matcher) -> Table:
        return prepare_entities(matcher, self._kb, self._rows, self._context.device)

    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        features = self._features[split]
        if features is None:
            raise RuntimeError("this validation was made without the training mentions")
        return prepare_in_tiles(matcher, features, "mentions", self._context.device)


class EncodingValidation(Validation):
    """With towers that train: items are encoded anew each time."""

    def __init__(self, dataset: Dataset, collator: Collator, context: Context) -> None:
        super().__init__(gold_rows(dataset, "validation"), dataset.num_entities, context)
        self._dataset, self._collator = dataset, collator

    def prepared_entities(self, matcher: Matcher) -> Table:
        return self._prepared(KB, matcher, self._rows)

    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        return self._prepared(split, matcher, None)

    def _prepared(self, split: str, matcher: Matcher, rows: range | None) -> Table:
        context = self._context
        return prepare_split(split, matcher, self._dataset, self._collator, context.device, rows, context.alive)
