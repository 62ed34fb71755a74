"""Scores of candidates: a re-ranker over the entities that a first stage ranks best for each mention of a split."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsmip.data.collate import Collator
from dsmip.data.dataset import Dataset
from dsmip.data.records import Entity, Mention
from dsmip.encoders.feature_cache import chunked
from dsmip.evaluation.ranks import NotRankable
from dsmip.units.matcher import Reranker

_MENTIONS, _PAIRS = 8, 128  # read at a time, scored at a time


@torch.no_grad()
def score_candidates(
    reranker: Reranker,
    dataset: Dataset,
    split: str,
    collator: Collator,
    row_MK: Tensor,
    device: torch.device,
    *,
    rows: range | None = None,
    after_batch: Callable[[int], None] = lambda num_mentions: None,
) -> Tensor:
    """float32 [M, K] on the CPU, -inf where there is no candidate.

    Args:
        row_MK: kb rows int64 [M, K] of the mentions' candidates, -1 where there are fewer.
        rows: Of the split's mentions, in shard order; None: all. `row_MK` is of these.
        after_batch: Takes how many mentions were scored.

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    reranker.eval()
    score_MK, first = torch.full(row_MK.shape, -torch.inf), 0
    for mentions in chunked(dataset.mentions(split, rows), _MENTIONS):
        of_these_mK = row_MK[first : first + len(mentions)]
        score_mK = score_mentions(reranker, dataset.entity, collator, mentions, of_these_mK, device)
        if len(broken := ((of_these_mK >= 0) & ~score_mK.isfinite()).nonzero()):
            mention, column = broken[0].tolist()
            before = 0 if rows is None else rows.start
            raise NotRankable(before + first + mention, int(of_these_mK[mention, column]), "re-ranker")
        score_MK[first : first + len(mentions)] = score_mK
        first += len(mentions)
        after_batch(len(mentions))
    return score_MK


@torch.no_grad()
def score_mentions(
    reranker: Reranker,
    entity_of: Callable[[int], Entity],
    collator: Collator,
    mentions: Sequence[Mention],
    row_mK: Tensor,
    device: torch.device,
) -> Tensor:
    """As `score_candidates`, of mentions that are in memory: float32 [m, K]; a score that is broken is no error.

    Args:
        entity_of: Gives the entity of a kb row.
        row_mK: kb rows int64, -1 where there are fewer.
    """
    mention_P, column_P = (row_mK >= 0).nonzero(as_tuple=True)
    row_e, entity_P = row_mK[mention_P, column_P].unique(return_inverse=True)
    items = collator.mentions(mentions).to(device)
    entities = collator.entities([entity_of(row) for row in row_e.tolist()]).to(device)
    found = [
        reranker.score_pairs(items, entities, mention_P[pairs].to(device), entity_P[pairs].to(device)).float().cpu()
        for pairs in _slices(len(mention_P))
    ]
    score_mK = torch.full(row_mK.shape, -torch.inf)
    return score_mK.index_put((mention_P, column_P), torch.cat(found)) if found else score_mK


def _slices(num_pairs: int) -> Iterator[slice]:
    return (slice(start, start + _PAIRS) for start in range(0, num_pairs, _PAIRS))
