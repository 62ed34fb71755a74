"""What workers gather of one another, and what they get back of their own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip import distributed
from tests.support.training.workers import run_workers

ROWS = ((3, 0), (0, 2), (4, 1))
"""Rows of two tensors on each of three workers."""


def tensors_of(worker: int) -> list[Tensor]:
    """Of two dtypes and ranks; all numbers differ."""
    first, second = ROWS[worker]
    start = 100 * worker
    return [
        torch.arange(start, start + 2 * first, dtype=torch.float32).view(first, 2),
        torch.arange(start, start + second),
        torch.arange(start, start + 6 * second, dtype=torch.float32).view(second, 2, 3),
    ]


def exchanged() -> dict[str, list[list[Tensor]] | list[Tensor] | Tensor]:
    """What one worker gathers, what it gets back of it, and the gradient of rows that it gathered."""
    rank = distributed.rank()
    everyone = distributed.gather_tensors(tensors_of(rank))
    factors = [[tensor * (rank + 1) for tensor in of_worker] for of_worker in everyone]
    own = tensors_of(rank)[0].requires_grad_()
    weights = torch.arange(sum(rows for rows, _ in ROWS), dtype=torch.float32)[:, None] * (rank + 1)
    (distributed.gather_rows(own) * weights).sum().backward()
    assert own.grad is not None
    return {"gathered": everyone, "summed": distributed.sum_own_parts(factors), "gradient": own.grad}


@pytest.mark.slow
def test_workers_gather_all_rows_and_get_the_sum_of_their_own_back(tmp_path: Path) -> None:
    """The numbers of rows differ, and some have none."""
    for rank, found in enumerate(run_workers(exchanged, 3, tmp_path)):
        for worker, tensors in enumerate(found["gathered"]):
            for tensor, expected in zip(tensors, tensors_of(worker), strict=True):
                assert torch.equal(tensor, expected)
        for tensor, expected in zip(found["summed"], tensors_of(rank), strict=True):
            assert torch.equal(tensor, expected * (1 + 2 + 3))
        first = sum(rows for rows, _ in ROWS[:rank])
        of_rows = 6.0 * torch.arange(first, first + ROWS[rank][0])[:, None].expand(-1, 2)
        assert torch.equal(found["gradient"], of_rows)


def test_one_worker_has_its_own() -> None:
    own = tensors_of(0)
    (gathered,) = distributed.gather_tensors(own)
    assert all(one is other for one, other in zip(gathered, own, strict=True))
    assert all(one is other for one, other in zip(distributed.sum_own_parts([own]), own, strict=True))
