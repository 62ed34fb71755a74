"""Metrics of the validation mentions while a model trains, and hard negatives from the same index.

Every worker prepares its share of the items, and ranks all mentions against its share of the entities.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsmip.data.collate import Collator, gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders import feature_cache
from dsmip.evaluation import preparation
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_batches, prepare_entities, prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.evaluation.ranks import NotRankable, Ranking
from dsmip.training.loop import Context
from dsmip.training.validation.hard_negatives import best_entities
from dsmip.training.validation.kept_trunks import KeptTrunks
from dsmip.training.validation.shares import gather_table, own_share, prepared_share
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

    Attributes:
        gold_row_M: Of the validation mentions, kb rows int64 [M].
        num_entities: Of the kb.
        keeps_index: The prepared entities of a validation stay in memory for the hard negatives that follow it.
    """

    keeps_index: bool = False

    def __init__(self, gold_row_M: Tensor, num_entities: int, context: Context) -> None:
        self.gold_row_M, self.num_entities, self._context = gold_row_M, num_entities, context
        self._fresh: EntityIndex | None = None

    @abstractmethod
    def prepared_entities(self, matcher: Matcher, rows: Sequence[int]) -> Table:
        """Of some kb rows, ascending."""

    @abstractmethod
    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        """Of a split; of training mentions, those that are trained on."""

    def __call__(self, matcher: Matcher) -> Mapping[str, float]:
        """Metrics, and how many pairs are too close for single precision to order them (for the records alone)."""
        return _metrics(self.ranking(matcher, 0))

    def over(self, matcher: Matcher, rows: Sequence[int]) -> Mapping[str, float]:
        """The metrics over some entities of the kb alone.

        Args:
            rows: Theirs, ascending; all golds of the validation mentions are among them.

        Raises:
            NotRankable: A score is NaN or infinite.
        """
        self._fresh = None
        index = self._index(matcher, rows)
        position_M = torch.searchsorted(torch.tensor(rows), self.gold_row_M)
        mentions = self.prepared_mentions(matcher, "validation")
        try:
            return _metrics(self._ranked(matcher, mentions, index, position_M))
        except NotRankable as broken:  # it knows the place among these rows
            raise NotRankable(broken.mention, rows[broken.entity_row], broken.part) from None

    def ranking(self, matcher: Matcher, top_k: int) -> Ranking:
        """Of the validation mentions, with their best entities."""
        index = self._index(matcher, range(self.num_entities))
        self._fresh = index if self.keeps_index else None
        mentions = self.prepared_mentions(matcher, "validation")
        ranking = self._ranked(matcher, mentions, index, self.gold_row_M)
        if not top_k:
            return ranking
        nobody_M, own_E = torch.full_like(self.gold_row_M, -1), torch.arange(self.num_entities)
        best = best_entities(matcher, mentions, index, nobody_M, own_E, top_k, self._context.device, self._alive)
        return replace(ranking, top_row_Mk=best.rows_MK, top_score_Mk=best.scores_MK)

    def hard_negatives(self, matcher: Matcher, gold_row_N: Tensor, group_E: Tensor, k: int) -> Tensor:
        """kb rows int64 [N, k] for each training mention, from the index of the validation just before, if any.

        Args:
            gold_row_N: kb rows of the training mentions' golds.
            group_E: See `alike_groups`.
        """
        matcher.eval()
        index = self._index(matcher, range(self.num_entities)) if self._fresh is None else self._fresh
        self._fresh = None  # the weights change from here on
        mentions, device = self.prepared_mentions(matcher, "train"), self._context.device
        use_backend(matcher, "auto", device)
        best = best_entities(matcher, mentions, index, group_E[gold_row_N], group_E, k, device, self._alive)
        return best.rows_MK

    def _index(self, matcher: Matcher, rows: Sequence[int]) -> EntityIndex:
        """This worker's share of some kb rows; its first row is a position among them."""
        matcher.eval()
        share = own_share(len(rows), preparation.TILE)
        own = prepared_share(share, lambda part: self.prepared_entities(matcher, rows[part.start : part.stop]))
        return EntityIndex([own], share.start)

    def _ranked(self, matcher: Matcher, mentions: Table, index: EntityIndex, gold_M: Tensor) -> Ranking:
        """Of mentions against all workers' indexes; `gold_M` are positions in these."""
        device = self._context.device
        use_backend(matcher, "auto", device)
        model = RankedModel(matcher, mentions, index, gold_M)
        return rank_unrefined(model, device, after_tile=self._alive)

    def _alive(self, num_mentions: int) -> None:
        self._context.alive()


class CachedValidation(Validation):
    """From cached features.

    Args:
        kb: Features of the whole kb `with_has_image`.
        training: Features of the training mentions; needed for hard negatives alone.
    """

    def __init__(self, validation: SplitFeatures, kb: Table, context: Context, training: Table | None = None) -> None:
        super().__init__(validation.gold_row_M, len(kb), context)
        self._features, self._kb = {"validation": validation.mentions, "train": training}, kb

    def prepared_entities(self, matcher: Matcher, rows: Sequence[int]) -> Table:
        return prepare_entities(matcher, self._kb, rows, self._context.device)

    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        features = self._features[split]
        if features is None:
            raise RuntimeError("this validation was made without the training mentions")
        return prepare_in_tiles(matcher, features, "mentions", self._context.device)


class EncodingValidation(Validation):
    """With towers that train: items are encoded anew each time.

    Attributes:
        keeps_trunks: What frozen trunks say of items is kept for the next time (`KeptTrunks`).
    """

    keeps_trunks: bool = False

    def __init__(self, dataset: Dataset, collator: Collator, context: Context) -> None:
        super().__init__(gold_rows(dataset, "validation"), dataset.num_entities, context)
        self._dataset, self._collator = dataset, collator
        self._kept: KeptTrunks | None = None

    def prepared_entities(self, matcher: Matcher, rows: Sequence[int]) -> Table:
        return self._prepared(KB, matcher, rows)

    def prepared_mentions(self, matcher: Matcher, split: Mentions) -> Table:
        share = own_share(self._dataset.num_mentions(split), feature_cache.BATCH_SIZE)
        return gather_table(prepared_share(share, lambda rows: self._prepared(split, matcher, rows)))

    def _prepared(self, split: str, matcher: Matcher, rows: Sequence[int]) -> Table:
        context = self._context
        if self.keeps_trunks and self._kept is None:
            self._kept = KeptTrunks(matcher, self._dataset, self._collator, context.device, context.warn)
        if self._kept is None:
            batches = feature_cache.item_batches(split, self._dataset, self._collator, rows)
        else:
            batches = self._kept.batches(split, rows)
        return prepare_batches(batches, split, matcher, context.device, context.alive)


def _metrics(ranking: Ranking) -> dict[str, float]:
    return ranking.metrics() | (ranking.cost.unrefined.metrics() if ranking.cost.unrefined else {})
