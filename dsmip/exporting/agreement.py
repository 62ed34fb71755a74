"""Agreement of cheaper searches with the exact one: what a smaller index, or candidates, find of its best entities."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from dsmip.data.dataset import Dataset
from dsmip.evaluation.index import EntityIndex
from dsmip.linking.linker import BATCH_SIZE, Linker
from dsmip.linking.search import Best, ExactSearch
from dsmip.ops.ranking import recall_at

MENTIONS, TOP = 320, 10
"""Of the validation split, at most; and how many of the best entities are looked for."""
CANDIDATES = (64, 256, 1024)


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


def measured_agreement(linker: Linker, dataset: Dataset, small_index: EntityIndex | None = None) -> list[Agreement]:
    """Agreements on validation mentions, of a smaller form of the linker's index, and of candidates.

    Nothing where the split has no mentions.
    """
    if not dataset.num_mentions("validation"):
        return []
    mentions = list(islice(dataset.mentions("validation"), MENTIONS))
    tables = [linker.prepared(mentions[start : start + BATCH_SIZE]) for start in range(0, len(mentions), BATCH_SIZE)]
    informed = [linker.search.informed(table) for table in tables]
    exact = [linker.search.best(table, TOP) for table in informed]
    found = []
    if small_index is not None:
        small = ExactSearch(linker.search.matcher, small_index, linker.device)
        found.append(
            _agreement("the index as stored", exact, [small.best(small.informed(table), TOP) for table in tables])
        )
    for count in (count for count in CANDIDATES if count < len(linker)):
        among = [linker.search.best_of(table, TOP, count) for table in informed]
        found.append(_agreement(f"candidates={count}", exact, among))
    return found


def _agreement(search: str, exact: Sequence[Best], found: Sequence[Best]) -> Agreement:
    num_mentions = sum(len(each.row_Mk) for each in exact)
    same = sum(int((a.row_Mk[:, 0] == b.row_Mk[:, 0]).sum()) for a, b in zip(exact, found, strict=True))
    recalls = [recall_at(a.row_Mk, b.row_Mk) * len(a.row_Mk) for a, b in zip(exact, found, strict=True)]
    return Agreement(search, same / num_mentions, sum(recalls) / num_mentions)
