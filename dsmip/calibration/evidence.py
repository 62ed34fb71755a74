"""Evidence of a mention's best scores: four numbers that are high where a system may be sure.

Scores of one expert have a scale of their own, so what is compared is never a raw score alone. M mentions, K kept
entities (best first), F numbers of evidence.
"""

import torch
from torch import Tensor

NUM_SCORES = 10
EVIDENCE = ("top", "margin", "lead", "concentration")
"""The best score; how far it is above the second; above the mean of the others; minus the entropy of their softmax."""


def evidence(score_MK: Tensor, scale_M: Tensor) -> Tensor:
    """float64 [M, F], in the order of EVIDENCE.

    Args:
        score_MK: float [M, K], the best scores, falling; of one alone, nothing but `top` says anything.
        scale_M: float64 [M] above 0: the unit in which each mention's scores are read (`scale_of`).

    >>> rows = evidence(torch.tensor([[3.0, 1.0, 0.0]]), torch.ones(1, dtype=torch.float64))
    >>> [round(each, 2) for each in rows[0].tolist()]
    [3.0, 2.0, 2.5, -0.52]
    """
    score_MK = score_MK.double() / scale_M[:, None]
    top_M, others_MK = score_MK[:, 0], score_MK[:, 1:]
    if not others_MK.shape[1]:
        zero_M = torch.zeros_like(top_M)
        return torch.stack([top_M, zero_M, zero_M, zero_M], dim=1)
    log_p_MK = score_MK.log_softmax(dim=1)
    entropy_M = -(log_p_MK.exp() * log_p_MK).sum(dim=1)
    return torch.stack([top_M, top_M - others_MK[:, 0], top_M - others_MK.mean(dim=1), -entropy_M], dim=1)


def scale_of(score_MK: Tensor) -> float:
    """The unit of an expert's scores: the median lead of the best over the mean of the others; 1 where that is 0.

    >>> scale_of(torch.tensor([[3.0, 1.0], [2.0, 1.0], [9.0, 1.0]]))
    2.0
    """
    if score_MK.shape[1] < 2 or not len(score_MK):
        return 1.0
    score_MK = score_MK.double()
    lead = float((score_MK[:, 0] - score_MK[:, 1:].mean(dim=1)).median())
    return lead if lead > 0 else 1.0


def without(score_MK: Tensor, is_left_out_MK: Tensor) -> Tensor:
    """float [M, K - 1]: the best scores as they would be if at most one entity of each mention were not there.

    Args:
        score_MK: float [M, K], falling.
        is_left_out_MK: bool [M, K], at most one True in a row; in a row without any, the last one goes.

    >>> left_out = torch.tensor([[True, False, False], [False, False, False]])
    >>> without(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), left_out)
    tensor([[2., 1.],
            [3., 2.]])
    """
    num_kept = score_MK.shape[1] - 1
    last_MK = torch.zeros_like(is_left_out_MK)
    last_MK[:, -1] = ~is_left_out_MK.any(dim=1)
    return score_MK[~(is_left_out_MK | last_MK)].view(len(score_MK), num_kept)
