"""Monotone logistic regression: more evidence never makes less sure, whatever the few mentions say that it is fit on.

p = sigmoid(x . w + b_e), w >= 0, with an intercept for each expert. N examples, F numbers of evidence, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_STEPS = 200
_WEIGHT_PENALTY, _INTERCEPT_PENALTY = 1.0, 1.0  # of a sum over examples, as if a mention or so spoke against them


def fit_logistic(evidence_NF: Tensor, expert_N: Tensor, target_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights float64 [F] and intercepts float64 [E]; the same at every call.

    The likelihood is penalised, so that targets which are all alike have a finite fit: weights by their squares, and
    intercepts by the squares of what they differ from their mean, which an expert with few examples stays near.

    Args:
        evidence_NF: float64 [N, F], of about mean 0 and deviation 1.
        expert_N: int64 [N].
        target_N: float64 [N], 0 or 1.
        num_experts: E.
    """
    roots_F = torch.full((evidence_NF.shape[1],), 0.5, dtype=torch.float64, requires_grad=True)  # w = roots ** 2
    mean = torch.zeros((), dtype=torch.float64, requires_grad=True)
    own_E = torch.zeros(num_experts, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [roots_F, mean, own_E],
        max_iter=_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logit_N = evidence_NF @ roots_F.square() + mean + own_E[expert_N]
        likelihood = F.binary_cross_entropy_with_logits(logit_N, target_N, reduction="sum")
        penalty = (
            _WEIGHT_PENALTY * roots_F.pow(4).sum() + _INTERCEPT_PENALTY * own_E.square().sum() + 1e-3 * mean.square()
        )
        total = (likelihood + penalty) / max(len(target_N), 1)
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return roots_F.detach().square(), (mean + own_E).detach()
