"""Collectives that mathematics can ignore: with one worker every function returns its argument.

Gradients are summed by hand (`sum_gradients`) instead of by DDP: the cached-gradient step runs the towers outside one
forward, where DDP's hooks would not see them, and the loss is already divided by the global number of mentions.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_VOCABULARY = 16_384
"""Rows from which a matrix is taken for a vocabulary's: a batch has few of its tokens."""


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
    """Adds up the gradients of all workers in one flat buffer; a missing gradient counts as zero.

    Of a vocabulary's embeddings only the rows of tokens that a worker has had are sent: the others are zero.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    vocabularies = [p.grad for p in trained if _is_vocabulary(p) and p.grad is not None]
    row_r = list(map(_used_rows, vocabularies))
    whole = [p.grad for p in trained if not _is_vocabulary(p) and p.grad is not None]
    sent = [*whole, *(gradient[rows] for gradient, rows in zip(vocabularies, row_r, strict=True))]
    flat = torch.cat([gradient.flatten() for gradient in sent])
    dist.all_reduce(flat)
    sums = [
        values.view_as(gradient) for values, gradient in zip(flat.split([g.numel() for g in sent]), sent, strict=True)
    ]
    for gradient, values in zip(whole, sums, strict=False):
        gradient.copy_(values)
    for gradient, rows, values in zip(vocabularies, row_r, sums[len(whole) :], strict=True):
        gradient[rows] = values


def _is_vocabulary(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and len(parameter) >= _VOCABULARY


def _used_rows(gradient_VD: Tensor) -> Tensor:
    """Rows that are not zero on some worker, the same on all."""
    used_V = (gradient_VD != 0).any(dim=1).byte()
    dist.all_reduce(used_V, dist.ReduceOp.MAX)
    return used_V.nonzero()[:, 0]


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
        return sum_own_parts([[part] for part in gradient.chunk(world_size())])[0]


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
    if world_size() == 1:
        return [value]
    mine = torch.tensor([value], device=device)
    return [int(v) for v in _gather_plain(mine)]


@torch.no_grad()
def gather_tensors(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Every worker's tensors, in rank order (no gradient); their numbers of rows may differ, and nothing else.

    One collective for the numbers of rows and one for each dtype, whatever the number of tensors.
    """
    if world_size() == 1:
        return [list(tensors)]
    rows = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    shapes = [
        [(count, *tensor.shape[1:]) for count, tensor in zip(counts, tensors, strict=True)]
        for counts in _gather_plain(rows[None]).tolist()
    ]
    everyone = [list(tensors) for _ in shapes]
    for numbers in _by_dtype(tensors):
        sizes = [[math.prod(shape[number]) for number in numbers] for shape in shapes]
        flat = torch.cat([tensors[number].flatten() for number in numbers])
        padded = torch.cat([flat, flat.new_zeros(max(map(sum, sizes)) - len(flat))])
        for worker, of_worker in enumerate(_gather_plain(padded[None])):
            pieces = of_worker[: sum(sizes[worker])].split(sizes[worker])
            for number, values in zip(numbers, pieces, strict=True):
                everyone[worker][number] = values.view(shapes[worker][number])
    return everyone


@torch.no_grad()
def sum_own_parts(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum over workers of what each has for this one, a reduce-scatter (no gradient).

    Args:
        parts: As `gather_tensors` returned them: of every worker the same shapes on all workers.
    """
    if world_size() == 1:
        return list(parts[0])
    own = parts[rank()]
    sums = list(own)
    for numbers in _by_dtype(own):
        sent = [torch.cat([of_worker[number].flatten() for number in numbers]) for of_worker in parts]
        size = len(sent[rank()])
        received = sent[0].new_empty(world_size() * size)
        dist.all_to_all_single(received, torch.cat(sent), [size] * world_size(), [len(part) for part in sent])
        pieces = received.view(world_size(), size).sum(dim=0).split([own[number].numel() for number in numbers])
        for number, values in zip(numbers, pieces, strict=True):
            sums[number] = values.view_as(own[number])
    return sums


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the tensors that have the same dtype, in the order of first use."""
    groups: dict[torch.dtype, list[int]] = {}
    for number, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(number)
    return list(groups.values())
