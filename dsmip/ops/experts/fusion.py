"""Experts fused as distributions over entities: calibrated, then mixed or multiplied.

An expert's scores times its scale (one over its temperature), less their log sum exp over the whole knowledge base,
are its log probabilities. M mentions, E entities, B experts.
"""

import math

import torch
from torch import Tensor

_LEAST, _MOST = 1e-3, 1e3  # of a scale
_TOLERANCE = 1e-4


def fit_scale(scores_ME: Tensor, gold_column_M: Tensor) -> float:
    """The factor on an expert's scores under which the golds are likeliest, from 0.001 to 1,000.

    The negative log likelihood is convex in it: its derivative, the sum over mentions of the scores' mean under the
    softmax less the gold's score, rises, and its zero is found by bisection.

    Args:
        scores_ME: Over the whole kb, of mentions whose golds the expert did not train on.

    Raises:
        ValueError: No mentions.

    >>> fit_scale(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), torch.tensor([0, 1, 1]))  # log(2) / 2
    0.3466
    """
    if len(gold_column_M) == 0:
        raise ValueError("no mentions: a scale cannot be fitted")
    gold_M = scores_ME.gather(1, gold_column_M[:, None])[:, 0].double()

    def falls(scale: float) -> bool:
        """Whether the likelihood falls from here on."""
        weight_ME = torch.softmax(scores_ME * scale, dim=1)
        return float(((weight_ME * scores_ME).sum(dim=1).double() - gold_M).sum()) > 0

    low, high = _LEAST, _MOST
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if falls(middle) else (middle, high)
    return float(f"{math.sqrt(low * high):.4g}")


def mixture_scores(log_p_BME: Tensor, log_pi_MB: Tensor) -> Tensor:
    """log sum over experts of pi p: [M, E], the log likelihood of each entity under the mixture."""
    return torch.logsumexp(log_p_BME + log_pi_MB.T[:, :, None], dim=0)


def mixture_losses(logits_MB: Tensor, log_p_MB: Tensor) -> Tensor:
    """-log sum over experts of pi p of the golds, [M], where pi is the softmax of the logits.

    Args:
        log_p_MB: Each expert's log probability of the gold.
    """
    return -torch.logsumexp(torch.log_softmax(logits_MB, dim=1) + log_p_MB, dim=1)


def product_losses(logits_MB: Tensor, log_p_MKB: Tensor) -> Tensor:
    """-log softmax of the golds among their rivals under the product of experts, each to the power exp(logit): [M].

    Powers need not add up to 1, so that a mention's product is as sure of itself as it should be; its ranking is that
    of `product_scores` with pi = softmax(logits).

    Args:
        log_p_MKB: Each expert's log probabilities of K entities, the gold first.

    >>> half = torch.tensor([[[0.5, 0.9], [0.5, 0.1]]]).log()  # two experts, one of which does not know
    >>> bool(torch.isclose(product_losses(torch.zeros(1, 2), half), torch.tensor([0.9]).log().neg()))
    True
    """
    return -(log_p_MKB * logits_MB.exp()[:, None]).sum(dim=2).log_softmax(dim=1)[:, 0]


def with_rivals(log_p_BME: Tensor, gold_column_M: Tensor, num_rivals: int) -> Tensor:
    """Log probabilities [M, K, B] of the gold, which comes first, and of its strongest rivals, at most `num_rivals`.

    Rivals are the other entities of the largest unweighted product, the strongest first.

    >>> one = torch.tensor([[[0.5, 0.2, 0.3]]]).log()
    >>> with_rivals(one, torch.tensor([1]), 1).exp().flatten()
    tensor([0.2000, 0.5000])
    """
    gold_M1 = gold_column_M[:, None]
    others_ME = log_p_BME.sum(dim=0).scatter(1, gold_M1, -torch.inf)
    rival_MK = others_ME.topk(min(num_rivals, log_p_BME.shape[2] - 1), dim=1).indices
    column_MK = torch.cat([gold_M1, rival_MK], dim=1)
    return log_p_BME.gather(2, column_MK.expand(len(log_p_BME), -1, -1)).permute(1, 2, 0)


def product_scores(log_p_BME: Tensor, log_pi_MB: Tensor) -> Tensor:
    """Sum over experts of pi log p: [M, E], a weighted product of experts (not normalised)."""
    return (log_p_BME * log_pi_MB.exp().T[:, :, None]).sum(dim=0)
