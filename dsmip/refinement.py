"""Close pairs again in float64, so that ranks do not depend on how single-precision scores were tiled.

A score in single precision errs in its last bits, and by how much depends on the shape of the call. Only pairs within
`band` of the gold's score, or of the last place of the top-k, can change a rank; they are scored again in double
precision, from the same prepared mentions and entities. M mentions, E entities of the index.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip.index import EntityIndex
from dsmip.models.base import Matcher
from dsmip.table import Table

GRID = 2.0**-30
"""Scores in double precision are compared on this grid: pairs of equal features tie whatever call they were in."""
_SAFETY = 8.0
_SAMPLE_MENTIONS, _SAMPLE_ENTITIES = 16, 64


@dataclass(frozen=True, slots=True)
class Refinement:
    """Number of pairs that were scored again, the band, and the largest error of single precision among those pairs."""

    num_pairs: int
    band: float
    largest_error: float


class PairScorer:
    """Scores of single pairs in float64, on the grid."""

    def __init__(self, matcher: Matcher, mentions: Table, index: EntityIndex, device: torch.device) -> None:
        self.matcher = copy.deepcopy(matcher).to(device).double().eval()
        self.mentions, self.index, self.device = mentions, index, device

    @torch.no_grad()
    def score(self, mention: int, columns: Tensor) -> Tensor:
        """float64 [n], on the CPU: one mention against n places of the index (int64, ascending)."""
        return self.score_and_choose(mention, columns)[0]

    @torch.no_grad()
    def score_and_choose(self, mention: int, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `score`, with the index of the expert that scored each pair, int64 [n] (None: no choice is made)."""
        if len(columns) == 0:
            return torch.zeros(0, dtype=torch.float64), None
        mentions = self.mentions.take(slice(mention, mention + 1)).to(self.device).cast(torch.float64)
        entities = self.index.take(columns).to(self.device).cast(torch.float64)
        scores = self.matcher.score(mentions, entities)
        total_n = scores.total_ME[0].double().cpu()
        chosen_n = None if scores.chosen_ME is None else scores.chosen_ME[0].cpu()
        return (total_n / GRID).round() * GRID, chosen_n

    def gold_scores(self, gold_row_M: Tensor) -> Tensor:
        """float64 [M]: the golds' scores, NaN for golds (kb rows) that are not in the index."""
        column_M = gold_row_M - self.index.first_row
        scores_M = torch.full((len(gold_row_M),), float("nan"), dtype=torch.float64)
        for mention in ((column_M >= 0) & (column_M < len(self.index))).nonzero()[:, 0].tolist():
            scores_M[mention] = self.score(mention, column_M[mention : mention + 1])[0]
        return scores_M


class Refiner:
    """Replaces close scores of a tile by exact ones. The band is measured on the first tile, and checked at the end.

    gold_score_M: float64 [M] of all mentions, from `PairScorer`.
    """

    def __init__(self, pairs: PairScorer, gold_score_M: Tensor) -> None:
        self._pairs, self._gold_score_M = pairs, gold_score_M
        self._band = 0.0
        self._largest_error = 0.0
        self._num_pairs = 0

    @property
    def band_held(self) -> bool:
        """Whether no refined score had erred by more than half of the band. If one had, `widen` and start anew."""
        return 2 * self._largest_error <= self._band

    def widen(self) -> None:
        """Forgets all tiles and takes a band that fits the largest error seen."""
        self._band, self._num_pairs = _SAFETY * self._largest_error, 0

    def report(self) -> Refinement:
        return Refinement(self._num_pairs, self._band, self._largest_error)

    def refine(self, scores_ME: Tensor, first_mention: int, k: int) -> tuple[Tensor, Tensor]:
        """The scores of the tile of mentions from `first_mention`, exact where they are close, and its golds' scores.

        float64 [M, E] and [M]. k: places of the top-k that must be exact as well.
        """
        if self._band == 0.0:
            self._band = max(_SAFETY * self._sample_error(scores_ME, first_mention), 2 * _rounding(scores_ME))
        refined_ME = scores_ME.double()
        gold_M = self._gold_score_M[first_mention : first_mention + len(scores_ME)].to(scores_ME.device)
        close_ME = (refined_ME - gold_M[:, None]).abs() <= self._band
        if k:
            last_M1 = scores_ME.topk(min(k, scores_ME.shape[1]), dim=1).values[:, -1:]
            close_ME |= scores_ME >= last_M1 - self._band
        for place in range(len(scores_ME)):
            columns = close_ME[place].nonzero()[:, 0]
            exact = self._exact(scores_ME, first_mention, place, columns)
            refined_ME[place, columns] = exact.to(scores_ME.device)
            self._num_pairs += len(columns)
        return refined_ME, gold_M

    def _sample_error(self, scores_ME: Tensor, first_mention: int) -> float:
        """Largest error among some pairs that are spread over the tile."""
        num_entities = scores_ME.shape[1]
        columns = torch.linspace(0, num_entities - 1, min(_SAMPLE_ENTITIES, num_entities)).long()
        for place in range(min(_SAMPLE_MENTIONS, len(scores_ME))):
            self._exact(scores_ME, first_mention, place, columns)
        return self._largest_error

    def _exact(self, scores_ME: Tensor, first_mention: int, place: int, columns: Tensor) -> Tensor:
        exact = self._pairs.score(first_mention + place, columns.cpu())
        errors = (exact - scores_ME[place, columns].cpu().double()).abs()
        self._largest_error = max(self._largest_error, float(errors.max()) if len(errors) else 0.0)
        return exact


def _rounding(scores_ME: Tensor) -> float:
    """The spacing of single-precision numbers of the scores' size: no band is narrower."""
    return float(scores_ME.abs().max()) * torch.finfo(torch.float32).eps + GRID
