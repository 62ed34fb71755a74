"""Matchers whose scores are known, and the ranks that a full sort of these gives."""

import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import TextUnit

CPU = torch.device("cpu")


class TableMatcher(Matcher):
    """Scores are looked up: `scores` [M, E] and, with `chosen`, the expert of each pair."""

    def __init__(self, scores: Tensor, chosen: Tensor | None = None) -> None:
        super().__init__()
        self.scores_ME, self.chosen_ME = scores, chosen

    def encode_mentions(self, batch: ItemBatch) -> Table:
        raise NotImplementedError

    def encode_entities(self, batch: ItemBatch) -> Table:
        raise NotImplementedError

    def prepare_mentions(self, features: Table) -> Table:
        return features

    def prepare_entities(self, features: Table) -> Table:
        return features

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        rows, columns = mentions.dense("row")[:, None], entities.dense("row")[None]
        return Scores(self.scores_ME[rows, columns], None if self.chosen_ME is None else self.chosen_ME[rows, columns])

    def encoder_trains(self) -> bool:
        return False


def numbered(count: int, first: int = 0) -> Table:
    return Table({"row": torch.arange(first, first + count)})


def ranks_by_sorting(scores_ME: Tensor, gold_M: Tensor) -> list[float]:
    """Mean position of the gold among all equal scores in a full sort."""
    found = []
    for scores, gold in zip(scores_ME, gold_M.tolist(), strict=True):
        order = scores.argsort(descending=True).tolist()
        equal = [position + 1 for position, column in enumerate(order) if scores[column] == scores[gold]]
        found.append(sum(equal) / len(equal))
    return found


class NoisyMatcher(TableMatcher):
    """Says `scores` in double precision, and in single precision errs by `errors` [M, E]."""

    def __init__(self, scores_ME: Tensor, errors_ME: Tensor) -> None:
        super().__init__(scores_ME)
        self.errors_ME = errors_ME

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        exact = super().score(mentions, entities)
        if mentions.dense("weight").dtype == torch.float64:
            return exact
        rows, columns = mentions.dense("row")[:, None], entities.dense("row")[None]
        return Scores((exact.total_ME + self.errors_ME[rows, columns]).float())


def weighted(count: int) -> Table:
    """Numbered rows with a column whose precision tells what is asked for."""
    return numbered(count).merged(Table({"weight": torch.ones(count)}))


class TextMatcher(TableMatcher):
    """A text unit alone."""

    def __init__(self, unit: TextUnit) -> None:
        super().__init__(torch.zeros(0))
        self.unit = unit

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        return Scores(self.unit.score(mentions, entities))
