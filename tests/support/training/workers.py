"""Runs a function in several worker processes of one gloo group on this machine."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_workers(function: Callable[..., Any], num_workers: int, folder: Path, *arguments: Any) -> list[Any]:
    """Results by rank of `function(*arguments)`: a module's function that returns what torch.save takes."""
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload(["dsmip.training.stages"])  # imported once for all workers of a session
    given = (function, num_workers, folder, arguments)
    start_processes(_worker, given, nprocs=num_workers, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_workers)]


def _worker(
    rank: int, function: Callable[..., Any], num_workers: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(seconds=200),  # a worker that waits for the other in vain fails the test
    )
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
