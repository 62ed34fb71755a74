"""Close pairs again in float64, so that ranks do not depend on how single-precision scores were tiled.

A score in single precision errs in its last bits, and by how much depends on the shape of the call. Only pairs within
`band` of the gold's score, or of the last one of the top-k, can change a rank; they are scored again in double
precision, from the same prepared mentions and entities. M mentions, E entities of the index.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsmip.data.table import Table
from dsmip.evaluation.index import EntityIndex
from dsmip.units.matcher import Matcher

GRID = 2.0**-30
"""Scores in double precision are compared on this grid: pairs of equal features tie whatever call they were in."""
_SAFETY = 8.0
_SAMPLE_MENTIONS = 16
_GOLDS = 16
_PROBE_STRIDE = 7919  # a prime: probes fall on all entities in turn
_ENTITIES = 4096  # of one call
_MENTIONS = 32  # at most at a time, each against the close entities of all
# so many pairs cost as much as a call: fewer needless ones are scored along
_CALL_ON_CPU, _CALL_ON_GPU = 256, 2**15


@dataclass(frozen=True, slots=True)
class Refinement:
    """What scoring close pairs again took.

    Attributes:
        num_pairs: Number of close pairs.
        num_scored: Number of pairs that were scored in float64 for it: several mentions are scored against the close
            entities of all at a time.
        band: Pairs within it of a decision are close.
        largest_error: Of the first scores of close pairs.
    """

    num_pairs: int
    num_scored: int
    band: float
    largest_error: float


@dataclass(frozen=True)
class Unrefined:
    """What the scores' own precision leaves open: entities within `band` of the gold may be on its other side.

    Attributes:
        close_M: Number of such entities int64 [M], true ties among them; no rank is off by more than that.
    """

    band: float
    close_M: Tensor

    def metrics(self) -> dict[str, float]:
        """The band, the number of close pairs, and of mentions that have any."""
        return {
            "band": self.band,
            "close_pairs": float(self.close_M.sum()),
            "close_mentions": float((self.close_M > 0).sum()),
        }


class DoubleCopies:
    """Copies of matchers in float64, each made once: of matchers that train no more."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Matcher, Matcher]] = {}

    def of(self, matcher: Matcher, device: torch.device) -> Matcher:
        """The matcher's copy on a device, without its towers: they would be most of what is copied."""
        if id(matcher) not in self._made:
            towers = {id(tower): nn.Identity() for tower in matcher.pretrained_towers()}
            self._made[id(matcher)] = matcher, copy.deepcopy(matcher, towers).to(device).double().eval()
        return self._made[id(matcher)][1]


class PairScorer:
    """Scores of single pairs in float64, on the grid. Lines about memory go to `notice`."""

    def __init__(
        self,
        matcher: Matcher,
        mentions: Table,
        index: EntityIndex,
        device: torch.device,
        notice: Callable[[str], None] = lambda text: None,
        copies: DoubleCopies | None = None,
    ) -> None:
        """
        Args:
            copies: Where the matcher's copy is kept for the next one (default: nowhere).
        """
        self.matcher = (copies or DoubleCopies()).of(matcher, device)
        self.mentions, self.index, self.device = mentions, index, device
        self.notice = notice
        self._most_mentions, self._most_entities = max(len(mentions), 1), _ENTITIES  # of one call

    def of(self, mentions: Table) -> "PairScorer":
        """The same for other mentions; the matcher is not copied again."""
        other = copy.copy(self)
        other.mentions, other._most_mentions = mentions, max(len(mentions), 1)
        return other

    @torch.no_grad()
    def score(self, row_m: Tensor, column_e: Tensor) -> Tensor:
        """float64 [m, e], on the CPU: mentions against positions in the index (int64, ascending)."""
        return self.score_and_choose(row_m, column_e)[0]

    @torch.no_grad()
    def score_and_choose(self, row_m: Tensor, column_e: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `score`, with the index of the expert that scored each pair, int64 [m, e] (None: no choice is made)."""
        if len(row_m) == 0 or len(column_e) == 0:
            return torch.zeros(len(row_m), len(column_e), dtype=torch.float64), None
        if len(column_e) > self._most_entities:
            scores = [self.score_and_choose(row_m, some_e) for some_e in column_e.split(self._most_entities)]
            return _joined(scores, dim=1)
        if len(row_m) > self._most_mentions:
            scores = [self.score_and_choose(some_m, column_e) for some_m in row_m.split(self._most_mentions)]
            return _joined(scores, dim=0)
        try:
            return self._score_and_choose(row_m, column_e)
        except torch.OutOfMemoryError:
            if len(row_m) == len(column_e) == 1:
                raise
        self._halve(len(row_m), len(column_e))  # here, where tensors of the failed call are no more
        return self.score_and_choose(row_m, column_e)

    def _score_and_choose(self, row_m: Tensor, column_e: Tensor) -> tuple[Tensor, Tensor | None]:
        mentions = self.mentions.take(row_m).to(self.device).cast(torch.float64)
        entities = self.index.take(column_e).to(self.device).cast(torch.float64)
        scores = self.matcher.score(mentions, entities)
        total_me = scores.total_ME.double().cpu()
        chosen_me = None if scores.chosen_ME is None else scores.chosen_ME.cpu()
        return (total_me / GRID).round() * GRID, chosen_me

    def _halve(self, num_mentions: int, num_entities: int) -> None:
        """What a call takes at most, after one with so many ran out of memory."""
        if num_mentions > 1:
            self._most_mentions = (num_mentions + 1) // 2
        else:
            self._most_entities = (num_entities + 1) // 2
        self.notice(
            f"{self.device} is out of memory in double precision: going on with {self._most_mentions} mentions"
            f" against {self._most_entities} entities at a time"
        )

    def gold_scores(self, gold_row_M: Tensor) -> Tensor:
        """float64 [M]: the golds' scores, NaN for golds (kb rows) that are not in the index."""
        column_M = gold_row_M - self.index.first_row
        scores_M = torch.full((len(gold_row_M),), float("nan"), dtype=torch.float64)
        here = ((column_M >= 0) & (column_M < len(self.index))).nonzero()[:, 0]
        for row_m in here.split(_GOLDS):  # a call costs as much as some hundred pairs
            column_e, index_m = column_M[row_m].unique(return_inverse=True)
            scores_M[row_m] = self.score(row_m, column_e).gather(1, index_m[:, None])[:, 0]
        return scores_M


def _joined(scores: Sequence[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    choices = [chosen_me for _, chosen_me in scores if chosen_me is not None]
    return torch.cat([score_me for score_me, _ in scores], dim), torch.cat(choices, dim) if choices else None


class SampleErrors(NamedTuple):
    """How precise scores are, by a sample of pairs.

    Attributes:
        largest: By how much they differ from exact ones, at most.
        spacing: Of numbers of their size.
    """

    largest: float
    spacing: float

    @property
    def band(self) -> float:
        """Pairs whose scores are farther apart than this keep their order, as far as the sample tells."""
        return max(_SAFETY * self.largest, 2 * self.spacing)


def sample_errors(
    pairs: PairScorer, score: Callable[[Tensor, Tensor], Tensor], gold_column_M: Tensor, num_mentions: int
) -> SampleErrors:
    """Errors of `score` (rows of mentions and positions in the index to [m, e]) on some of them and their golds.

    The sample has golds: they score high, and errors grow with scores. Four times as many entities as mentions are
    taken.

    Args:
        pairs: Scores them exactly.
        score: What is measured.
        gold_column_M: int64, positions in the index; a gold that is not in it has one outside.
        num_mentions: How many are taken.
    """
    row_m = _spread(len(pairs.mentions), num_mentions)
    gold_m = gold_column_M[row_m]
    here_m = (gold_m >= 0) & (gold_m < len(pairs.index))
    column_e = torch.cat([_spread(len(pairs.index), 4 * num_mentions), gold_m[here_m]]).unique()
    return _errors(score(row_m, column_e), pairs.score(row_m, column_e))


class Refiner:
    """Replaces close scores of a tile by exact ones. The band is measured on the first tile, and checked at the end.

    `gold_score_M` is float64 [M] of all mentions, from `PairScorer`.
    """

    def __init__(self, pairs: PairScorer, gold_score_M: Tensor) -> None:
        self._pairs, self._gold_score_M = pairs, gold_score_M
        self._band = 0.0
        self._largest_error = 0.0
        self._num_pairs = self._num_scored = 0

    @property
    def band_held(self) -> bool:
        """Whether no refined score had erred by more than half of the band. If one had, `widen` and start anew."""
        return 2 * self._largest_error <= self._band

    def widen(self) -> None:
        """Forgets all tiles and takes a band that fits the largest error seen."""
        self._band, self._num_pairs = _SAFETY * self._largest_error, 0  # what was scored in vain counts as scored

    def report(self) -> Refinement:
        return Refinement(self._num_pairs, self._num_scored, self._band, self._largest_error)

    def refine(self, scores_ME: Tensor, first_mention: int, own_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Makes the close scores of a tile exact.

        Args:
            scores_ME: Of the tile, in single precision.
            first_mention: The tile's first one.
            own_M: The golds' scores in single precision, NaN where they are not in the index.
            k: Ranks of the top-k must be exact as well.

        Returns:
            The tile's scores float64 [M, E], exact where they are close, and its golds' scores float64 [M].
        """
        gold_M = self._gold_score_M[first_mention : first_mention + len(scores_ME)].to(scores_ME.device)
        self._note_errors((own_M.double() - gold_M)[~own_M.isnan()])
        if self._band == 0.0:
            row_m = first_mention + torch.arange(min(_SAMPLE_MENTIONS, len(scores_ME)))
            column_e = _spread(scores_ME.shape[1], 4 * _SAMPLE_MENTIONS)
            self._set_band(_errors(scores_ME[: len(row_m), column_e], self._pairs.score(row_m, column_e)))
            self._band = max(self._band, 2 * _spacing(scores_ME))
        refined_ME = scores_ME.double()
        close_ME = (refined_ME - gold_M[:, None]).abs() <= self._band
        if k:
            last_M1 = scores_ME.topk(min(k, scores_ME.shape[1]), dim=1).values[:, -1:]
            close_ME |= scores_ME >= last_M1 - self._band
        close_ME |= self._probes(scores_ME, first_mention)
        call = _CALL_ON_CPU if scores_ME.device.type == "cpu" else _CALL_ON_GPU
        for row_m in scored_together(close_ME, call):
            column_e = close_ME[row_m].any(dim=0).nonzero()[:, 0]
            close_me = close_ME[row_m][:, column_e]
            exact_me = self._pairs.score(first_mention + row_m, column_e.cpu()).to(scores_ME.device)
            self._note_errors((exact_me - scores_ME[row_m][:, column_e])[close_me])
            refined_ME[row_m[:, None], column_e] = exact_me.where(close_me, refined_ME[row_m][:, column_e])
            self._num_pairs += int(close_me.sum())
            self._num_scored += exact_me.numel()
        return refined_ME, gold_M

    @staticmethod
    def _probes(scores_ME: Tensor, first_mention: int) -> Tensor:
        """One pair of every mention, close or not, to see errors that carry a pair out of the band."""
        row_M = torch.arange(len(scores_ME), device=scores_ME.device)
        column_M = (first_mention + row_M) * _PROBE_STRIDE % scores_ME.shape[1]
        probed_ME = torch.zeros_like(scores_ME, dtype=torch.bool)
        probed_ME[row_M, column_M] = True
        return probed_ME

    def _set_band(self, sample: SampleErrors) -> None:
        """By the errors of a sample of pairs, and of the golds that were seen."""
        self._largest_error = max(self._largest_error, sample.largest)
        self._band = SampleErrors(self._largest_error, sample.spacing).band

    def _note_errors(self, errors: Tensor) -> None:
        self._largest_error = max(self._largest_error, _largest(errors))


def scored_together(close_ME: Tensor, call: int) -> Iterator[Tensor]:
    """Rows of mentions to score at a time against the close entities of all of them, bool [M, E].

    A group is halved until its needless pairs are fewer than what one `call` more would cost: mentions whose close
    entities are the same stay together.
    """
    groups = list(torch.arange(len(close_ME)).split(_MENTIONS))[::-1]
    while groups:
        row_m = groups.pop()
        close_me = close_ME[row_m]
        num_needless = len(row_m) * int(close_me.any(dim=0).sum()) - int(close_me.sum())
        if num_needless <= call:
            yield row_m
        else:
            groups += [row_m[len(row_m) // 2 :], row_m[: len(row_m) // 2]]


def _errors(sample_me: Tensor, exact_me: Tensor) -> SampleErrors:
    return SampleErrors(_largest(exact_me - sample_me.cpu()), _spacing(sample_me))


def _largest(errors: Tensor) -> float:
    return float(errors.abs().nan_to_num(0.0, posinf=torch.inf).max()) if len(errors) else 0.0


def _spacing(scores_ME: Tensor) -> float:
    """The spacing of numbers of the scores' size and precision: no band is narrower."""
    return float(scores_ME.abs().max()) * torch.finfo(scores_ME.dtype).eps + GRID


def _spread(num_items: int, num_chosen: int) -> Tensor:
    """Places of at most `num_chosen` items, ascending."""
    return torch.linspace(0, num_items - 1, min(num_chosen, num_items)).long()
