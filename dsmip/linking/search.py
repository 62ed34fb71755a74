"""The exact search: the best entities of prepared mentions among all of an index, and a second stage over them.

Shapes: M mentions, k kept entities, K re-ranked ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import torch
from torch import Tensor

from dsmip.data.collate import Collator
from dsmip.data.records import Entity, Mention
from dsmip.data.table import Table
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors, VectorSource, link_with
from dsmip.evaluation.experts.survey import KeptScores, informed, survey
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import NotRankable
from dsmip.evaluation.refinement import DoubleCopies, PairScorer, Refiner
from dsmip.evaluation.tiles import Tiles, default_tiles, placed
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.ops import ranking as ops
from dsmip.rank_options import RankOptions
from dsmip.reranking.candidates import score_mentions
from dsmip.units.matcher import Matcher, Reranker
from dsmip.units.text_unit import use_backend, use_precision

MOST_KEPT = 2**26
"""Bytes of experts' scores that a call keeps; several threads may each do so."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best entities of M mentions, best first, equal scores by lower row (CPU tensors).

    Attributes:
        row_Mk: kb rows int64.
        score_Mk: float64, those of the ranking that `dsmip evaluate` makes.
        chosen_Mk: Index of the expert that scored each, int64; None for a matcher that makes no choice.
    """

    row_Mk: Tensor
    score_Mk: Tensor
    chosen_Mk: Tensor | None = None


class ExactSearch:
    """Scores mentions against all entities, tile by tile, close ones in float64, as a ranking does.

    Safe to use from several threads; the index and the model are there once.
    """

    def __init__(
        self,
        matcher: Matcher,
        index: EntityIndex,
        device: torch.device,
        options: RankOptions = RankOptions(),
        vectors: VectorSource | None = None,
    ) -> None:
        """
        Args:
            matcher: it moves to the device.
            index: it moves there as well, where it fits; else its tiles do for every call.
            device: where pairs are scored.
            options: what computes token-level scores, and how precisely; no score depends on it.
            vectors: what candidates are found by (default: the model's global vectors).
        """
        self.matcher, self.device = matcher.to(device).eval(), device
        use_precision(matcher, options.precision, use_backend(matcher, options.backend, device))
        self.index = placed(index, device, lambda line: None)
        self._copies = DoubleCopies()
        self._pairs = PairScorer(matcher, Table({}), self.index, device, copies=self._copies)
        self._vectors = vectors or GlobalVectors(self.matcher, device)
        self._building = Lock()

    @cached_property
    def candidates(self) -> CandidateSearch:
        """The search for candidates, built when it is first asked for.

        Raises:
            UserError: the model has no vectors.
        """
        return CandidateSearch(self._vectors, self.index)

    def best_of(self, mentions: Table, top: int, candidates: int) -> Best:
        """As `best`, but only the `candidates` entities with the largest products of vectors are scored.

        What is found has its exact score; what the candidates miss is lost. Experts that are fused score all entities
        all the same, to know what their scores are worth: candidates then save nothing, but where there is no room to
        keep those scores.

        Raises:
            UserError: the model has no vectors.
            NotRankable: a score is NaN, or a mention's vector is not finite.
        """
        with self._building:
            search = self.candidates
        found = link_with(self._pairs.of(mentions), search, max(candidates, top), top)
        return Best(found.row_MT, found.score_MT, found.chosen_MT)

    def informed(self, mentions: Table, *, for_best: bool = True) -> RankedModel:
        """The model with prepared mentions, which know what fused experts say of them.

        Args:
            for_best: It will be asked for the `best`: what the experts say of all entities is kept for that.

        Raises:
            NotRankable: a score is NaN or infinite.
        """
        model = RankedModel(self.matcher, mentions, self.index, torch.full((len(mentions),), -1))
        if not self.matcher.surveyed():
            return model
        kept = KeptScores(MOST_KEPT if for_best else 0)
        return informed(model, survey(model, self.device, copies=self._copies, kept=kept), kept)

    @torch.no_grad()
    def best(self, informed: RankedModel, top: int) -> Best:
        """The `top` best entities (at most all) of mentions that are `informed`.

        Raises:
            NotRankable: a score is NaN or infinite.
        """
        mentions = informed.mentions
        tiles = Tiles(
            informed.matcher,
            mentions,
            informed.index,
            informed.gold_row_M,
            self.device,
            default_tiles(self.device, len(self.index)),
            lambda line: None,
            lambda done: None,
            informed.expert_scores,
        )
        refiner = Refiner(self._pairs.of(mentions), torch.full((len(mentions),), torch.nan, dtype=torch.float64))
        columns = tiles.best(top, refiner)
        while not refiner.band_held:
            refiner.widen()
            columns = tiles.best(top, refiner)
        return Best(columns["top_row"] + self.index.first_row, columns["top_score"], columns.get("chosen_top"))

    @torch.no_grad()
    def part_scores(self, mentions: Table, row_Mk: Tensor) -> list[dict[str, list[float]]]:
        """What each expert or unit says of each mention and some entities, in float32, by its name: to be shown.

        Args:
            mentions: they are `informed`.
            row_Mk: kb rows int64.
        """
        found = []
        for mention, row_k in enumerate(row_Mk):
            ascending_k, order_k = row_k.sort()
            entities = self.index.take(ascending_k - self.index.first_row).to(self.device)
            parts = self.matcher.part_scores(mentions.rows(slice(mention, mention + 1)).to(self.device), entities)
            back_k = order_k.argsort()
            found.append({name: part_ME[0].float().cpu()[back_k].tolist() for name, part_ME in parts.items()})
        return found


@dataclass(frozen=True)
class SecondStage:
    """A re-ranker over the best entities of a search.

    Attributes:
        candidates: How many it scores.
    """

    reranker: Reranker
    collator: Collator
    candidates: int
    device: torch.device

    @property
    def reads_images(self) -> bool:
        """Whether it looks at pictures."""
        return "image" in self.collator.item_format.of_entities

    def __call__(self, first: Best, mentions: Sequence[Mention], knowledge_base: KnowledgeBase) -> Best:
        """The candidates by their new scores, then the others as the first stage has them.

        Raises:
            NotRankable: a score is NaN or infinite.
        """
        row_MK, with_image = first.row_Mk[:, : self.candidates], self.reads_images

        def entity_of(row: int) -> Entity:
            return knowledge_base.entity(row, with_image=with_image)

        score_MK = score_mentions(self.reranker, entity_of, self.collator, mentions, row_MK, self.device)
        if len(broken := (~score_MK.isfinite()).nonzero()):
            mention, column = broken[0].tolist()
            raise NotRankable(mention, int(row_MK[mention, column]), "re-ranker")
        best, rest = ops.merge_top_k(score_MK.double(), row_MK, row_MK.shape[1]), slice(row_MK.shape[1], None)
        return replace(
            first,
            row_Mk=torch.cat([best.rows_MK, first.row_Mk[:, rest]], dim=1),
            score_Mk=torch.cat([best.scores_MK, first.score_Mk[:, rest]], dim=1),
        )
