"""Exact ranking of every mention against every entity, by counting, in tiles.

rank = 1 + number of better entities + half the number of tied ones, the gold column excluded. The gold's score is
read from the same scoring call as its column's, never from a second one: scores of two calls differ in the last bits.
Memory grows with one mention tile times the number of entities, not with all pairs. Shapes: M mentions, E entities of
this worker's slice, B experts, k kept candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip.distributed import sum_over_workers
from dsmip.metrics import summarise
from dsmip.models.base import Matcher
from dsmip.ops import ranking as ops
from dsmip.table import Table, concatenate


@dataclass(frozen=True)
class Ranking:
    """Where each mention's gold landed (CPU tensors).

    counts: better and tied entities, int64 [M] each. top_row_Mk, top_score_Mk: best k entities. chosen_*: index of the
    expert that scored the gold pair, the top-k pairs, and the number of pairs per expert; None for a matcher that
    makes no choice. tied_choices_M: number of pairs for which another expert was as good a choice.
    """

    counts: ops.Counts
    top_row_Mk: Tensor
    top_score_Mk: Tensor
    chosen_gold_M: Tensor | None = None
    chosen_top_Mk: Tensor | None = None
    chosen_pairs_MB: Tensor | None = None
    tied_choices_M: Tensor | None = None

    @property
    def rank_M(self) -> Tensor:
        """Realistic ranks, float64 [M]."""
        return ops.realistic_ranks(self.counts)

    def metrics(self, rows: Tensor | None = None) -> dict[str, float]:
        """hits@k, MRR and mean ranks over all mentions or over the chosen `rows` (bool [M])."""
        chosen = slice(None) if rows is None else rows
        return summarise(ops.Counts(self.counts.better_M[chosen], self.counts.tied_M[chosen]))


@torch.no_grad()
def rank(
    matcher: Matcher,
    mentions: Table,
    entities: Table,
    gold_row_M: Tensor,
    *,
    device: torch.device,
    first_row: int = 0,
    top_k: int = 0,
    num_choices: int = 0,
    mention_tile: int = 128,
    entity_tile: int = 2048,
) -> Ranking:
    """Ranks prepared `mentions` against this worker's slice of prepared `entities`.

    gold_row_M: kb rows int64 [M]. first_row: kb row of the slice's first entity; with several workers every one passes
    all mentions and its own slice, counts are added up, and `top_k` must be 0. num_choices: B when experts are chosen.
    Raises ValueError when a score is NaN.
    """
    matcher.eval()
    tiles = [
        _rank_tile(
            matcher,
            mentions.rows(slice(start, start + mention_tile)).to(device),
            entities,
            gold_row_M[start : start + mention_tile].to(device) - first_row,
            top_k,
            num_choices,
            entity_tile,
        )
        for start in range(0, len(mentions), mention_tile)
    ]
    columns: Mapping[str, Tensor] = {name: torch.cat([tile[name] for tile in tiles]).cpu() for name in tiles[0]}
    return Ranking(
        ops.Counts(columns["better"], columns["tied"]),
        columns["top_row"] + first_row,
        columns["top_score"],
        columns.get("chosen_gold"),
        columns.get("chosen_top"),
        columns.get("chosen_pairs"),
        columns.get("tied_choices"),
    )


def _rank_tile(
    matcher: Matcher,
    mentions: Table,
    entities: Table,
    gold_column_M: Tensor,
    top_k: int,
    num_choices: int,
    entity_tile: int,
) -> dict[str, Tensor]:
    scores_ME, chosen_ME, tied_choices_M = _score_all(matcher, mentions, entities, entity_tile, gold_column_M.device)
    num_entities = scores_ME.shape[1]
    here_M = (gold_column_M >= 0) & (gold_column_M < num_entities)
    column_M = gold_column_M.clamp(0, num_entities - 1)
    own_gold_M = scores_ME.gather(1, column_M[:, None])[:, 0]
    gold_M = sum_over_workers(own_gold_M.where(here_M, torch.zeros_like(own_gold_M)))
    better_M, tied_M = ops.count_against(scores_ME, gold_M, column_M.where(here_M, -1))
    top_score_Mk, top_row_Mk = ops.top_k(scores_ME, min(top_k, num_entities))
    tile = {
        "better": sum_over_workers(better_M),
        "tied": sum_over_workers(tied_M),
        "top_score": top_score_Mk,
        "top_row": top_row_Mk,
    }
    if chosen_ME is not None and num_choices:
        tile["chosen_gold"] = chosen_ME.gather(1, column_M[:, None])[:, 0].long()
        tile["chosen_top"] = chosen_ME.gather(1, top_row_Mk).long()
        tile["chosen_pairs"] = torch.stack([(chosen_ME == b).sum(dim=1) for b in range(num_choices)], dim=1)
        tile["tied_choices"] = tied_choices_M
    return tile


def _score_all(
    matcher: Matcher, mentions: Table, entities: Table, entity_tile: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores [M, E], choices [M, E] or None, and the number of tied choices [M]."""
    totals, choices = [], []
    tied_choices_M = torch.zeros(len(mentions), dtype=torch.int64, device=device)
    for start in range(0, len(entities), entity_tile):
        scores = matcher.score(mentions, entities.rows(slice(start, start + entity_tile)).to(device))
        totals.append(scores.total_ME)
        if scores.chosen_ME is not None:
            choices.append(scores.chosen_ME.to(torch.int8))
        if scores.tied_choice_ME is not None:
            tied_choices_M += scores.tied_choice_ME.sum(dim=1)
    return torch.cat(totals, dim=1), torch.cat(choices, dim=1) if choices else None, tied_choices_M


@torch.no_grad()
def prepare_in_tiles(matcher: Matcher, features: Table, side: str, device: torch.device, tile: int = 512) -> Table:
    """`prepare_mentions` or `prepare_entities` (side: "mentions" | "entities") of a whole features table, by rows."""
    matcher.eval()
    prepare = matcher.prepare_mentions if side == "mentions" else matcher.prepare_entities
    starts = range(0, len(features), tile)
    return concatenate([prepare(features.take(slice(s, s + tile)).to(device)) for s in starts])
