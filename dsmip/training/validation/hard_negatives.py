"""Hard negatives: what mentions are best taken for, without what is as right as their gold."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.evaluation.index import EntityIndex
from dsmip.ops.ranking import TopK, merge_top_k
from dsmip.units.matcher import Matcher

_MENTIONS, _ENTITIES = 128, 2048  # of a tile


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
