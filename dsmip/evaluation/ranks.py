"""Ranks, choices and cost: the result of a ranking, and one result from those of disjoint slices of the kb.

Shapes: M mentions, B experts, k kept candidates; S slices, C = S * k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmip.evaluation.metrics import summarise
from dsmip.evaluation.refinement import Refinement, Unrefined
from dsmip.ops import ranking as ops


class NotRankable(ValueError):
    """A score is NaN, which compares false with everything and would rank first, or infinite.

    Attributes:
        mention: Row of the mention.
        entity_row: The entity's kb row.
        part: The expert or unit that the score comes from (`Scores.broken_part`), where that is known.
    """

    def __init__(self, mention: int, entity_row: int, part: str | None = None) -> None:
        super().__init__(mention, entity_row, part)  # what a process hands to another
        self.mention, self.entity_row, self.part = mention, entity_row, part

    def __str__(self) -> str:
        of_part = f" ({self.part})" if self.part else ""
        pair = f"mention {self.mention} and entity row {self.entity_row}"
        return f"the score of {pair} is NaN or infinite{of_part}: no ranking"


@dataclass(frozen=True, slots=True)
class Choices:
    """Which experts a gate chose, as indices of them.

    Attributes:
        gold_M: int64 [M], the expert that scored the gold pair (-1: the gold is of another slice).
        top_Mk: int64 [M, k], those of the best entities.
        pairs_MB: int64 [M, B], number of pairs that each expert scored.
        tied_M: int64 [M], number of pairs for which another expert was as good a choice; None: not asked.
    """

    gold_M: Tensor
    top_Mk: Tensor
    pairs_MB: Tensor
    tied_M: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a ranking took, and what it leaves open.

    Attributes:
        token_pairs_M2: int64 [M, 2], as in `Scores`, of all tiles; None: all token-level scores were computed.
        refinement: What scoring close pairs again took; None when they were not.
        unrefined: How many close pairs there are, where they were not scored again.
    """

    token_pairs_M2: Tensor | None = None
    refinement: Refinement | None = None
    unrefined: Unrefined | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Where each mention's gold landed (CPU tensors).

    Attributes:
        counts: Better and tied entities, int64 [M] each.
        top_row_Mk: int64 [M, k], kb rows of the best entities.
        top_score_Mk: float [M, k], their scores.
        choices: None for a matcher that makes no choice.
        cost: What it took.
    """

    counts: ops.Counts
    top_row_Mk: Tensor
    top_score_Mk: Tensor
    choices: Choices | None = None
    cost: Cost = Cost()

    @property
    def rank_M(self) -> Tensor:
        """Realistic ranks, float64 [M]."""
        return ops.realistic_ranks(self.counts)

    def first(self, k: int) -> "Ranking":
        """With the best k entities of what is kept."""
        choices = self.choices and replace(self.choices, top_Mk=self.choices.top_Mk[:, :k])
        top_row_Mk, top_score_Mk = self.top_row_Mk[:, :k], self.top_score_Mk[:, :k]
        return replace(self, top_row_Mk=top_row_Mk, top_score_Mk=top_score_Mk, choices=choices)

    def metrics(self, rows: Tensor | None = None) -> dict[str, float]:
        """hits@k, MRR and mean ranks over all mentions or over the chosen `rows` (bool [M])."""
        chosen = slice(None) if rows is None else rows
        return summarise(ops.Counts(self.counts.better_M[chosen], self.counts.tied_M[chosen]))


def check_golds(gold_score_M: Tensor, gold_row_M: Tensor, rows: range) -> None:
    """Checks that every gold has a score.

    Args:
        gold_score_M: float64 [M], NaN where there is none.
        gold_row_M: kb rows int64 [M].
        rows: kb rows of the index that the scores were made with.

    Raises:
        NotRankable: A gold in `rows` scores NaN.
        ValueError: Another one has no score.
    """
    for mention in gold_score_M.isnan().nonzero()[:, 0].tolist():
        row = int(gold_row_M[mention])
        if row in rows:
            raise NotRankable(mention, row)
        raise ValueError(f"mention {mention}: its gold, kb row {row}, is not in the index, and its score is not given")


def merge_gold_scores(scores: Sequence[Tensor]) -> Tensor:
    """Golds' exact scores float64 [M] from those of disjoint slices, each NaN where the gold is in another slice."""
    scores_SM = torch.stack(list(scores))
    best_M = scores_SM.where(~scores_SM.isnan(), -torch.inf).amax(dim=0)
    return best_M.where(~scores_SM.isnan().all(dim=0), torch.nan)


def merge_rankings(rankings: Sequence[Ranking], top_k: int) -> Ranking:
    """One ranking from those of disjoint slices of the kb that were made with the same exact gold scores.

    Args:
        rankings: By `dsmip.evaluation.ranking.rank`, each with its `top_k` best entities, or all.
        top_k: Number of best entities to keep.
    """
    rows_MC = torch.cat([each.top_row_Mk for each in rankings], dim=1)
    scores_MC = torch.cat([each.top_score_Mk for each in rankings], dim=1)
    top = ops.merge_top_k(scores_MC, rows_MC, top_k)
    by_row_MC = rows_MC.argsort(dim=1)
    column_MK = by_row_MC.gather(1, torch.searchsorted(rows_MC.gather(1, by_row_MC), top.rows_MK.contiguous()))
    choices = [each.choices for each in rankings if each.choices is not None]
    return Ranking(
        ops.Counts(
            *(torch.stack(counts).sum(dim=0) for counts in zip(*(each.counts for each in rankings), strict=True))
        ),
        top.rows_MK,
        top.scores_MK,
        _merged_choices(choices, column_MK) if choices else None,
        _merged_cost([each.cost for each in rankings]),
    )


def _merged_choices(choices: Sequence[Choices], column_MK: Tensor) -> Choices:
    """Choices of all slices together.

    Args:
        column_MK: Where the best entities of all are among the slices' best entities, one slice after another.
    """
    return Choices(
        torch.stack([each.gold_M for each in choices]).amax(dim=0),
        torch.cat([each.top_Mk for each in choices], dim=1).gather(1, column_MK),
        torch.stack([each.pairs_MB for each in choices]).sum(dim=0),
        _summed([each.tied_M for each in choices]),
    )


def _merged_cost(costs: Sequence[Cost]) -> Cost:
    refinements = [each.refinement for each in costs if each.refinement is not None]
    refinement = Refinement(
        sum(each.num_pairs for each in refinements),
        sum(each.num_scored for each in refinements),
        max((each.band for each in refinements), default=0.0),
        max((each.largest_error for each in refinements), default=0.0),
    )
    return Cost(_summed([each.token_pairs_M2 for each in costs]), refinement if refinements else None)


def _summed(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).sum(dim=0) if there else None
