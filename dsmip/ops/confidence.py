"""Figures of confidences: calibration error, risk and coverage, AUROC, F1 at a threshold. N answers, C bins.

An answer has a confidence and is right or wrong. Sources: Guo et al., On Calibration of Modern Neural Networks (2017),
eq. 5; Geifman and El-Yaniv, Selective Classification (2017); Hanley and McNeil, The Meaning and Use of the Area under
a ROC Curve (1982). Equal confidences are told apart by nobody: they count as half a win, and are answered together.
"""

import torch
from torch import Tensor

BINS = 15


def auroc(score_N: Tensor, positive_N: Tensor) -> Tensor:
    """Float64 scalar: how often a positive scores above a negative; NaN where there is none of either.

    Args:
        score_N: float [N], higher means rather positive.
        positive_N: bool [N].

    >>> auroc(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, True])).item()
    0.5
    """
    _, at_N, count_V = torch.unique(score_N, return_inverse=True, return_counts=True)
    mid_rank_V = count_V.cumsum(0) - (count_V - 1) / 2  # of equal scores the mean of their ranks, from 1
    positives = positive_N.sum().double()
    negatives = len(score_N) - positives
    wins = mid_rank_V.double()[at_N][positive_N].sum() - positives * (positives + 1) / 2
    share: Tensor = wins / (positives * negatives)
    return share


def expected_calibration_error(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> Tensor:
    """Float64 scalar: mean over answers of |share that is right - mean confidence| of each answer's bin.

    Args:
        confidence_N: float [N] within 0 and 1; bins are of equal width.
        right_N: bool [N].
        bins: C.

    >>> expected_calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False])).item()
    0.25
    """
    confidence_N = confidence_N.double()
    bin_N = (confidence_N * bins).long().clamp(max=bins - 1)
    gap_C = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_N, right_N.double() - confidence_N)
    return gap_C.abs().sum() / len(confidence_N)


def risk_coverage(confidence_N: Tensor, right_N: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and risk (share of wrong ones among the answered) while ever less sure answers are given, float64 [N].

    Of equal confidences each has the risk that all of them have together.

    >>> coverage_N, risk_N = risk_coverage(torch.tensor([0.2, 0.9]), torch.tensor([False, True]))
    >>> coverage_N.tolist(), risk_N.tolist()
    ([0.5, 1.0], [0.0, 0.5])
    """
    confidence_N, order_N = confidence_N.sort(descending=True)
    answered_N = torch.arange(1, len(order_N) + 1, dtype=torch.float64)
    wrong_N = (~right_N[order_N]).double().cumsum(0)
    _, count_V = torch.unique_consecutive(confidence_N, return_counts=True)
    last_N = torch.repeat_interleave(count_V.cumsum(0) - 1, count_V)
    return answered_N / len(order_N), wrong_N[last_N] / answered_N[last_N]


def area_under_risk(confidence_N: Tensor, right_N: Tensor) -> Tensor:
    """Float64 scalar: mean risk over all coverages (AURC); 0 where all are right.

    >>> area_under_risk(torch.tensor([0.2, 0.9]), torch.tensor([False, True])).item()
    0.25
    """
    return risk_coverage(confidence_N, right_N)[1].mean()


def precision_and_f1(recall: Tensor, false_alarms: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Precision and F1 of a yes-or-no answer in a world where a `share` of all is what is looked for; 0 without finds.

    Args:
        recall: Share found of what is looked for.
        false_alarms: Share found of everything else.
        share: Between 0 and 1.

    >>> [round(each.item(), 3) for each in precision_and_f1(torch.tensor(0.5), torch.tensor(0.1), 0.2)]
    [0.556, 0.526]
    """
    right, wrong = recall.double() * share, false_alarms.double() * (1 - share)
    precision = right / (right + wrong).clamp(min=1e-300)
    return precision, 2 * precision * recall / (precision + recall).clamp(min=1e-300)
