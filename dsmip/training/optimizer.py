"""Optimizer, learning rate schedule and gradient clipping of a training."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dsmip.config import OptimizerConfig, TrainConfig


def clip_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Scales all gradients down to `clip_norm` (None: leaves them) and returns their norm before, 0-dimensional."""
    if clip_norm is not None:
        return nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def build_optimizer(module: nn.Module, config: TrainConfig, towers: Collection[str] = ()) -> torch.optim.Optimizer:
    """AdamW (Adam when `weight_decay` is 0), with the configuration's betas, eps and rule of decay.

    Args:
        module: its parameters that require gradients are trained.
        towers: names of those that may have a learning rate of their own (`Matcher.tower_tensors`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = (config.tower_learning_rate or config.learning_rate) if name in towers else config.learning_rate
            decay = config.weight_decay if _decays(name, parameter, config.optimizer) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )


def _decays(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    if config.decay == "matrices":
        return parameter.ndim > 1
    return not name.endswith("bias")  # PyTorch's word for them in every layer, in_proj_bias too


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step: linear warm-up, then constant, or a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
