"""Costs of a piece of work: processor time, time on the clock, and memory beside what was in use before.

On a CPU memory is the growth of the process's resident memory from the start of the work to its peak, as Linux counts
it. Before that the peak is reset and freed memory that the allocator still holds is given back, so that no earlier
work's memory is used again unseen. On CUDA it is the growth of what PyTorch has allocated.
"""

import ctypes
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Cost:
    """cpu_s: of all threads. wall_s: on the clock. peak_bytes: None where the system does not tell."""

    cpu_s: float
    wall_s: float
    peak_bytes: int | None

    def seconds(self, device: torch.device) -> float:
        """What is compared: processor time on a CPU, which other programs disturb least; else time on the clock."""
        return self.cpu_s if device.type == "cpu" else self.wall_s


def measured(work: Callable[[], Result], device: torch.device) -> tuple[Result, Cost]:
    """The result of `work` and its cost."""
    before = _start_peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = None if before is None else _peak(device) - before
    return result, Cost(cpu, wall, peak)


def _start_peak(device: torch.device) -> int | None:
    """Bytes in use now, from where the peak counts; None when it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
        return status_bytes("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status, such as VmRSS.

    Raises:
        OSError: There is no such file.
    """
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def kept_for_backward(work: Callable[[], object], parameters: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that autograd stores while `work` runs, one of each storage, without parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor  # held, so that no later tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return list(kept.values())
