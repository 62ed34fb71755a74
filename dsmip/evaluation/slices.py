"""One ranking from those of disjoint slices of the kb. Shapes as in `dsmip.evaluation.ranking`; S slices, C = S * k."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsmip.evaluation.ranking import Ranking
from dsmip.evaluation.refinement import Refinement
from dsmip.ops import ranking as ops


def merge_gold_scores(parts: Sequence[Tensor]) -> Tensor:
    """Golds' exact scores float64 [M] from those of disjoint slices, each NaN where the gold is in another slice."""
    scores_SM = torch.stack(list(parts))
    best_M = scores_SM.where(~scores_SM.isnan(), -torch.inf).amax(dim=0)
    return best_M.where(~scores_SM.isnan().all(dim=0), torch.nan)


def merge_rankings(parts: Sequence[Ranking], top_k: int) -> Ranking:
    """One ranking from those of disjoint slices of the kb that were made with the same exact gold scores and `refine`.

    Every part must have kept its `top_k` best entities, or all.
    """
    rows_MC = torch.cat([part.top_row_Mk for part in parts], dim=1)
    scores_MC = torch.cat([part.top_score_Mk for part in parts], dim=1)
    top = ops.merge_top_k(scores_MC, rows_MC, top_k)
    by_row_MC = rows_MC.argsort(dim=1)
    place_MK = by_row_MC.gather(1, torch.searchsorted(rows_MC.gather(1, by_row_MC), top.rows_MK.contiguous()))
    gold, top_choice = (
        [value for part in parts if (value := getattr(part, name)) is not None]
        for name in ("chosen_gold_M", "chosen_top_Mk")
    )
    refinements = [part.refinement for part in parts if part.refinement is not None]
    return Ranking(
        ops.Counts(*(torch.stack(counts).sum(dim=0) for counts in zip(*(part.counts for part in parts), strict=True))),
        top.rows_MK,
        top.scores_MK,
        torch.stack(gold).amax(dim=0) if gold else None,
        torch.cat(top_choice, dim=1).gather(1, place_MK) if top_choice else None,
        _summed(parts, "chosen_pairs_MB"),
        _summed(parts, "tied_choices_M"),
        _summed(parts, "token_pairs_M2"),
        Refinement(
            sum(each.num_pairs for each in refinements),
            sum(each.num_scored for each in refinements),
            max(each.band for each in refinements),
            max(each.largest_error for each in refinements),
        )
        if refinements
        else None,
    )


def _summed(parts: Sequence[Ranking], name: str) -> Tensor | None:
    values = [value for part in parts if (value := getattr(part, name)) is not None]
    return torch.stack(values).sum(dim=0) if values else None
