"""Validation while a model trains: metrics over the whole kb, and hard negatives from the same index.

Every worker prepares and ranks against its own slice of the kb.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.data.collate import Collator, gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_entities, prepare_in_tiles, prepare_split
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.evaluation.ranks import Ranking
from dsmip.ops.ranking import TopK, merge_top_k
from dsmip.training.loop import Context
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import use_backend

Mentions = Literal["validation", "train"]
_MENTIONS, _ENTITIES = 128, 2048  # of a tile


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

    Attributes:
        keeps_index: The prepared entities of a validation stay in memory for the hard negatives that follow it.
    """

    keeps_index: bool = False

    def __init__(self, gold_row_M: Tensor, num_entities: int, context: Context) -> None:
        self._gold_row_M, self._num_entities, self._context = gold_row_M, num_entities, context
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
        ranking = self.ranking(matcher, 0)
        return ranking.metrics() | (ranking.cost.unrefined.metrics() if ranking.cost.unrefined else {})

    def ranking(self, matcher: Matcher, top_k: int) -> Ranking:
        """Of the validation mentions, with their best entities."""
        matcher.eval()
        device = self._context.device
        entities = self.prepared_entities(matcher)
        self._fresh = entities if self.keeps_index else None
        mentions = self.prepared_mentions(matcher, "validation")
        use_backend(matcher, "auto", device)
        model = RankedModel(matcher, mentions, EntityIndex([entities], self._rows.start), self._gold_row_M)
        ranking = rank_unrefined(model, device, after_tile=lambda _: self._context.alive())
        if not top_k:
            return ranking
        nobody_M, own_E = torch.full_like(self._gold_row_M, -1), torch.arange(self._num_entities)
        best = best_entities(matcher, mentions, model.index, nobody_M, own_E, top_k, device, self._alive)
        return replace(ranking, top_row_Mk=best.rows_MK, top_score_Mk=best.scores_MK)

    def _alive(self, num_mentions: int) -> None:
        self._context.alive()

    def hard_negatives(self, matcher: Matcher, gold_row_N: Tensor, group_E: Tensor, k: int) -> Tensor:
        """kb rows int64 [N, k] for each training mention, from the index of the validation just before, if any.

        Args:
            gold_row_N: kb rows of the training mentions' golds.
            group_E: See `alike_groups`.
        """
        matcher.eval()
        entities = self.prepared_entities(matcher) if self._fresh is None else self._fresh
        self._fresh = None  # the weights change from here on
        mentions, device = self.prepared_mentions(matcher, "train"), self._context.device
        use_backend(matcher, "auto", device)
        index = EntityIndex([entities], self._rows.start)
        best = best_entities(matcher, mentions, index, group_E[gold_row_N], group_E, k, device, self._alive)
        return best.rows_MK


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


def alike_groups(dataset: Dataset) -> Tensor:
    """int64 [E]: a number that entities of equal name and attributes share. One of them is no wrong answer."""
    texts = dataset.entity_texts()
    numbers: dict[tuple[str, str], int] = {}
    pairs = zip(texts.column("name").to_pylist(), texts.column("attributes").to_pylist(), strict=True)
    return torch.tensor([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=torch.int64)


@torch.no_grad()
def best_entities(
    matcher: Matcher,
    mentions: Table,
    index: EntityIndex,
    left_out_M: Tensor,
    group_E: Tensor,
    k: int,
    device: torch.device,
    after_tile: Callable[[int], None] = lambda num_mentions: None,
) -> TopK:
    """The k best scored entities of each mention, on the CPU, best first; row -1 and score -inf where there are fewer.

    With a process group every worker passes all mentions and the index of its own slice of the kb, and gets the same.

    Args:
        mentions: Prepared.
        left_out_M: Of which group no entity is taken (-1: of none).
        group_E: Of the whole kb, such as `alike_groups`.
    """
    matcher.eval()
    found = []
    for start in range(0, len(mentions), _MENTIONS):
        rows = slice(start, start + _MENTIONS)
        left_out_m = left_out_M[rows].to(device)
        found.append(_of_tile(matcher, mentions.take(rows).to(device), index, left_out_m, group_E, k, device))
        after_tile(min(start + _MENTIONS, len(mentions)))
    return TopK(torch.cat([each.scores_MK.cpu() for each in found]), torch.cat([each.rows_MK.cpu() for each in found]))


def _of_tile(
    matcher: Matcher,
    mentions: Table,
    index: EntityIndex,
    left_out_M: Tensor,
    group_E: Tensor,
    k: int,
    device: torch.device,
) -> TopK:
    score_MK = torch.full((len(mentions), k), -torch.inf, device=device)
    row_MK = torch.full((len(mentions), k), -1, device=device)
    first = index.first_row
    for entities in index.tiles(_ENTITIES):
        score_ME = matcher.score(mentions, entities.to(device)).total_ME
        group_e = group_E[first : first + len(entities)].to(device)
        score_ME = score_ME.masked_fill(left_out_M[:, None] == group_e, -torch.inf)
        row_ME = torch.arange(first, first + len(entities), device=device).expand_as(score_ME)
        best = merge_top_k(torch.cat([score_MK, score_ME], dim=1), torch.cat([row_MK, row_ME], dim=1), k)
        score_MK, row_MK = best.scores_MK, best.rows_MK
        first += len(entities)
    if distributed.world_size() > 1:
        score_MK, row_MK = _side_by_side(score_MK), _side_by_side(row_MK)
        score_MK, row_MK = merge_top_k(score_MK, row_MK, k)
    return TopK(score_MK, row_MK.masked_fill(score_MK == -torch.inf, -1))


def _side_by_side(own_MK: Tensor) -> Tensor:
    """[M, W K] of all W workers."""
    return torch.cat(list(distributed.gather_rows(own_MK).chunk(distributed.world_size())), dim=1)
