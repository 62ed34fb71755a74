"""Collectives that mathematics can ignore: with one worker every function returns its argument.

Gradients are summed by hand (`sum_gradients`) instead of by DDP: the cached-gradient step runs the towers outside one
forward, where DDP's hooks would not see them, and the loss is already divided by the global number of mentions.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This worker's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def any_worker(value: bool, device: torch.device) -> bool:
    """Whether the value is true on at least one worker."""
    if world_size() == 1:
        return value  # without a trip to the device
    return bool(sum_over_workers(torch.tensor(float(value), device=device)))


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The element-wise sum over workers (no gradient)."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def max_over_workers(value: float, device: torch.device) -> float:
    """The largest of the workers' numbers."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all workers in one flat buffer; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    dist.all_reduce(flat)
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


class _GatherRows(torch.autograd.Function):
    """All workers' rows of equal shape; backward hands every worker the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all workers in rank order [sum N, ...]; differentiable; the numbers of rows may differ."""
    if world_size() == 1:
        return tensor
    counts = gather_ints(len(tensor), tensor.device)
    largest = max(counts)
    padding = tensor.new_zeros((largest - len(tensor), *tensor.shape[1:]))
    padded = torch.cat([tensor, padding])
    gathered = _GatherRows.apply(padded) if padded.is_floating_point() else _gather_plain(padded)
    keep = [chunk[:count] for chunk, count in zip(gathered.chunk(world_size()), counts, strict=True)]
    return torch.cat(keep)


def _gather_plain(padded: Tensor) -> Tensor:
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded.contiguous())
    return torch.cat(gathered)


def gather_ints(value: int, device: torch.device) -> list[int]:
    """Every worker's number, in rank order."""
    mine = torch.tensor([value], device=device)
    return [int(v) for v in _gather_plain(mine)]


def sum_own_rows(gathered: Tensor, num_rows: int) -> Tensor:
    """This worker's `num_rows` rows of the sum over workers of a tensor laid out as by `gather_rows` (no gradient)."""
    start = sum(gather_ints(num_rows, gathered.device)[: rank()])
    return sum_over_workers(gathered)[start : start + num_rows]
