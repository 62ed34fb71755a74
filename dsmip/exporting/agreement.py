"""Agreement of cheaper searches with the exact one: what a smaller index finds of its best entities, and candidates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.data.table import Table
from dsmip.evaluation.candidates import CandidateSearch
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel
from dsmip.linking.linker import BATCH_SIZE, Linker
from dsmip.linking.search import Best, ExactSearch
from dsmip.ops.ranking import recall_at

MENTIONS, TOP = 320, 10
"""Of the validation split, at most; and how many of the best entities are looked for."""
CANDIDATES = (10, 100, 1000)


@dataclass(frozen=True)
class Agreement:
    """What a cheaper search finds of the exact one's best.

    Attributes:
        search: What it is.
        same_best: Share of mentions with the same best entity.
        recall: Share of the exact best `TOP` entities that are among its best `TOP`.
    """

    search: str
    same_best: float
    recall: float

    def __str__(self) -> str:
        return (
            f"{self.search} finds the same best entity for {self.same_best:.1%} of validation mentions, and "
            f"{self.recall:.1%} of their best {TOP}"
        )


@dataclass(frozen=True)
class CandidateRecall:
    """What candidates hold.

    Attributes:
        k: How many there are of each mention.
        best: Share of mentions whose exact best entity is among them: that their best link is the exact one.
        gold: Share of mentions whose gold is.
    """

    k: int
    best: float
    gold: float


@dataclass(frozen=True)
class Probes:
    """Mentions, and what the exact search finds for them.

    Attributes:
        tables: Prepared and informed, batch by batch.
        exact: Of each batch, the `TOP` best.
        gold_row_M: kb rows of the golds.
    """

    tables: Sequence[Table]
    exact: Sequence[Best]
    gold_row_M: Tensor

    @classmethod
    def of(cls, linker: Linker, mentions: Sequence[Mention]) -> Self:
        """Of some mentions with a gold."""
        tables, exact = list[Table](), list[Best]()
        for informed in informed_batches(linker, mentions):
            tables.append(informed.mentions)
            exact.append(linker.search.best(informed, TOP))
            del informed  # with its experts' scores, before the next ones are made
        return cls(tables, exact, torch.tensor([each.entity_row for each in mentions]))

    @classmethod
    def of_validation(cls, linker: Linker, dataset: Dataset) -> "Self | None":
        """Of the first validation mentions; None where there are none."""
        mentions = list(islice(dataset.mentions("validation"), MENTIONS))
        return cls.of(linker, mentions) if mentions else None

    def agreement(self, linker: Linker, small_index: EntityIndex) -> Agreement:
        """Of a smaller form of the linker's index."""
        small = ExactSearch(linker.search.matcher, small_index, linker.device)
        found = [small.best(small.informed(table), TOP) for table in self.tables]
        same = sum(int((a.row_Mk[:, 0] == b.row_Mk[:, 0]).sum()) for a, b in zip(self.exact, found, strict=True))
        recalls = [recall_at(a.row_Mk, b.row_Mk) * len(a.row_Mk) for a, b in zip(self.exact, found, strict=True)]
        num_mentions = len(self.gold_row_M)
        return Agreement("the index as stored", same / num_mentions, sum(recalls) / num_mentions)

    def recalls(self, search: CandidateSearch, counts: Iterable[int] = CANDIDATES) -> list[CandidateRecall]:
        """Of candidates that a search of the whole index finds; none where all entities would be candidates."""
        counts = [k for k in counts if k < len(search)]
        if not counts:
            return []
        row_MK = torch.cat([search.candidates(table, max(counts)).cpu() for table in self.tables])
        best_row_M = torch.cat([each.row_Mk[:, 0] for each in self.exact])
        return [candidate_recall(row_MK[:, :k], best_row_M, self.gold_row_M) for k in counts]


def candidate_recall(row_Mk: Tensor, best_row_M: Tensor, gold_row_M: Tensor) -> CandidateRecall:
    """Of candidates in any order.

    Args:
        row_Mk: Their kb rows int64.
        best_row_M, gold_row_M: kb rows int64 of the exact best entities and of the golds.

    >>> candidate_recall(torch.tensor([[3, 1], [0, 2]]), torch.tensor([1, 1]), torch.tensor([3, 2]))
    CandidateRecall(k=2, best=0.5, gold=1.0)
    """
    best, gold = (recall_at(row_M[:, None], row_Mk) for row_M in (best_row_M, gold_row_M))
    return CandidateRecall(row_Mk.shape[1], best, gold)


def informed_batches(linker: Linker, mentions: Sequence[Mention]) -> Iterator[RankedModel]:
    """The linker's model with prepared mentions that can be scored, batch by batch."""
    for start in range(0, len(mentions), BATCH_SIZE):
        yield linker.search.informed(linker.prepared(mentions[start : start + BATCH_SIZE]))
