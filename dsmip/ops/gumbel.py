"""Choosing one expert of B with Gumbel noise (Jang et al., 2017; DSMIP eqs 15-16). B is the last dimension.

DSMIP's eq. 16 prints tau outside the exponential, where it would cancel; as in its source, the temperature divides
the noisy logits here: softmax((log_pi + noise) / tau).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_gumbel(shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, float32 of `shape`, always finite. `generator` must live on `device`.

    >>> sample_gumbel((2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    uniform_exponential = torch.empty(tuple(shape), device=device).exponential_(generator=generator)
    return -uniform_exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def relaxed_choice(log_pi: Tensor, noise: Tensor | None, tau: float) -> Tensor:
    """Soft choice softmax((log_pi + noise) / tau) over the last dimension; sums to one, same shape as `log_pi`.

    Args:
        log_pi: Unnormalised log probabilities [..., B].
        noise: Gumbel noise of the same shape, None for none.
        tau: The temperature, positive.

    Raises:
        ValueError: `tau` is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    noisy = log_pi if noise is None else log_pi + noise
    return torch.softmax(noisy / tau, dim=-1)


def hard_choice(log_pi: Tensor, noise: Tensor | None, tau: float) -> Tensor:
    """One-hot choice [..., B]: exactly one-hot forward, the gradient of `relaxed_choice` backward (straight-through).

    Ties go to the first index, which is the expert listed first.

    >>> hard_choice(torch.tensor([[0.0, 2.0, 2.0]]), None, 0.1)
    tensor([[0., 1., 0.]])
    """
    soft = relaxed_choice(log_pi, noise, tau)
    noisy = log_pi if noise is None else log_pi + noise  # not `soft`: that ties where it underflows
    hard = F.one_hot(noisy.argmax(dim=-1), log_pi.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly zero forward
