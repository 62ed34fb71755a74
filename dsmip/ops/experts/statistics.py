"""Statistics of an expert's scores over a whole knowledge base: the softmax's normaliser, top, margin and entropy.

Statistics of disjoint sets of columns merge into those of all columns, so tiles and workers count on their own; they
equal the full matrix's but for the rounding of float64. M mentions, E entities (columns), B experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertStatistics(NamedTuple):
    """Of one expert's scores against some columns, each float64 [M] but for `row_M`.

    Attributes:
        top_M: The best score.
        second_M: The second best, the same where two are best; -infinity where there is one column alone.
        row_M: int64, where the best score is, the lowest of equals.
        mass_M: Sum of exp(score - top).
        moment_M: Sum of (score - top) exp(score - top).
    """

    top_M: Tensor
    second_M: Tensor
    row_M: Tensor
    mass_M: Tensor
    moment_M: Tensor

    @property
    def log_normaliser_M(self) -> Tensor:
        """log sum exp of the scores: a score less it is the log probability of its entity."""
        return self.top_M + self.mass_M.log()

    @property
    def entropy_M(self) -> Tensor:
        """Of the softmax over the columns, in nats."""
        return self.mass_M.log() - self.moment_M / self.mass_M

    @property
    def top_probability_M(self) -> Tensor:
        """Of the best entity, in 0..1."""
        return self.mass_M.reciprocal()

    @property
    def margin_M(self) -> Tensor:
        """By how much the best score is above the second, at least 0; 0 where there is no second."""
        return (self.top_M - self.second_M).nan_to_num(posinf=0.0)


def expert_statistics(scores_ME: Tensor, first_row: int = 0) -> ExpertStatistics:
    """Statistics of one tile of columns, of which there must be one at least.

    Args:
        first_row: Of the tile's first column.

    >>> found = expert_statistics(torch.tensor([[0.0, 2.0, 1.0]]), first_row=10)
    >>> found.row_M.item(), found.margin_M.item(), round(found.log_normaliser_M.item(), 4)
    (11, 1.0, 2.4076)
    """
    scores_ME = scores_ME.double()
    top_M1, column_M1 = _best(scores_ME)
    below_ME = scores_ME - top_M1
    weight_ME = below_ME.exp()
    second_M = scores_ME.scatter(1, column_M1, -torch.inf).amax(dim=1)
    return ExpertStatistics(
        top_M1[:, 0], second_M, column_M1[:, 0] + first_row, weight_ME.sum(dim=1), (below_ME * weight_ME).sum(dim=1)
    )


def merge_statistics(parts: Sequence[ExpertStatistics]) -> ExpertStatistics:
    """Statistics of all columns from those of disjoint sets of them, in any order."""
    top_SM, second_SM, row_SM, mass_SM, moment_SM = (torch.stack(each) for each in zip(*parts, strict=True))
    best_2M = torch.cat([top_SM, second_SM]).topk(2, dim=0).values
    below_SM = top_SM - best_2M[0]
    weight_SM = below_SM.exp()
    largest = torch.iinfo(torch.int64).max
    return ExpertStatistics(
        best_2M[0],
        best_2M[1],
        row_SM.where(top_SM == best_2M[0], largest).amin(dim=0),
        (weight_SM * mass_SM).sum(dim=0),
        (weight_SM * (moment_SM + below_SM * mass_SM)).sum(dim=0),
    )


def num_confidence(num_experts: int) -> int:
    """How many numbers `confidence` makes of a mention.

    >>> num_confidence(3)
    18
    """
    pairs = num_experts * (num_experts - 1)
    return 3 * num_experts + pairs // 2 + pairs


def confidence(experts: Sequence[ExpertStatistics], log_p_MBB: Tensor) -> Tensor:
    """How sure each expert is of itself, and what it thinks of the others' answers: float64 [M, `num_confidence`].

    Per expert its top probability, its margin and its entropy; per pair of experts whether their best entities are the
    same one (1 or 0); per ordered pair the first one's log probability of the second one's best entity.

    Args:
        experts: Of all columns.
        log_p_MBB: Log probability that the first expert (dimension 1) gives to the best entity of the second.
    """
    numbers = [number_M for each in experts for number_M in (each.top_probability_M, each.margin_M, each.entropy_M)]
    numbers += [(one.row_M == other.row_M).double() for one, other in combinations(experts, 2)]
    numbers += [log_p_MBB[:, one, other].double() for one, other in permutations(range(len(experts)), 2)]
    return torch.stack(numbers, dim=1)


@dataclass(frozen=True)
class Survey:
    """What is known of mentions once every expert has scored them against the whole knowledge base.

    Attributes:
        statistics: By expert, of its scores times its scale.
        score_MBB: float64, the first expert's score (times its scale) of the second one's best entity.
    """

    statistics: Mapping[str, ExpertStatistics]
    score_MBB: Tensor

    @property
    def log_normaliser_MB(self) -> Tensor:
        """float64."""
        return torch.stack([each.log_normaliser_M for each in self.statistics.values()], dim=1)

    @property
    def confidence_MF(self) -> Tensor:
        """float64, of `confidence`."""
        log_p_MBB = self.score_MBB - self.log_normaliser_MB[:, :, None]
        return confidence(list(self.statistics.values()), log_p_MBB)


def _best(scores_ME: Tensor) -> tuple[Tensor, Tensor]:
    """The best score [M, 1] and the lowest column that has it, int64 [M, 1]."""
    top_M1 = scores_ME.amax(dim=1, keepdim=True)
    column_E = torch.arange(scores_ME.shape[1], device=scores_ME.device)
    column_M = column_E.expand_as(scores_ME).where(scores_ME == top_M1, scores_ME.shape[1] - 1).amin(dim=1)
    return top_M1, column_M[:, None]
