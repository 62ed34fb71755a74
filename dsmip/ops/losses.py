"""The in-batch contrastive loss (DSMIP eqs 17 and 18). M mentions, E entity columns."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_losses(scores_ME: Tensor, gold_column_M: Tensor, excluded_ME: Tensor | None = None) -> Tensor:
    """-log softmax(scores)[gold] of each mention, float [M].

    Args:
        scores_ME: float [M, E].
        gold_column_M: int64 [M].
        excluded_ME: bool [M, E], True takes a pair out of the denominator (the same gold in another column); the gold
            column itself is never taken out.

    >>> bool((contrastive_losses(torch.zeros(1, 4), torch.tensor([2])) == torch.tensor(4.0).log()).all())
    True
    """
    if excluded_ME is not None:
        excluded_ME = excluded_ME.scatter(1, gold_column_M[:, None], False)
        scores_ME = scores_ME.masked_fill(excluded_ME, -torch.inf)
    return F.cross_entropy(scores_ME, gold_column_M, reduction="none")


def contrastive_loss(scores_ME: Tensor, gold_column_M: Tensor, excluded_ME: Tensor | None = None) -> Tensor:
    """Sum over mentions of `contrastive_losses`, a scalar (DSMIP eq. 17)."""
    return contrastive_losses(scores_ME, gold_column_M, excluded_ME).sum()
