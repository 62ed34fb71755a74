"""The machines that a forecast is for: this one as it is, or a cluster's nodes as a cluster file describes them."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmip.linking.memory import free_memory
from dsmip.planning.probing.measure import status_bytes
from dsmip.planning.probing.probe import Cost

RAY_BYTES = 500 << 20
"""Of a local Ray: its servers, its driver's agents and its object store, as it is used."""
RAY_OF_TRAINING = 250 << 20
"""Of what Ray Train keeps beside a training's workers."""
RAY_OF_WORKER = 130 << 20
"""Of Ray itself in a worker or driver, beside what this process has imported."""
CUDA_HOST_BYTES = 2500 << 20
"""Of a process that uses a GPU, on the host."""
CUDA_BYTES = 600 << 20
"""Of a process on its GPU, before its first tensor."""


@dataclass(frozen=True)
class Node:
    """Equal machines.

    Attributes:
        memory, gpu_memory: Bytes of one, and of one of its GPUs; None: nobody says.
        cpu_rate, gpu_rate: Floating-point operations a second of a CPU and of a GPU; None: costs are seconds here.
    """

    name: str
    count: int
    cpus: float
    gpus: float
    memory: int | None
    gpu_memory: int | None = None
    cpu_rate: float | None = None
    gpu_rate: float | None = None

    def seconds(self, cost: Cost, *, on_gpu: bool, threads: int) -> float:
        """What a worker takes for a cost; while a GPU computes, a thread reads."""
        rate = self.gpu_rate if on_gpu else self.cpu_rate
        if rate is None:
            return cost.seconds / (1 if on_gpu else threads)
        if on_gpu:
            return max(cost.flops / rate, cost.reading)
        return (cost.flops / rate + cost.reading) / threads


@dataclass(frozen=True)
class Machines:
    """All that there is.

    Attributes:
        nodes: Those that work.
        process: Bytes of a process that has imported what workers import, without Ray.
        start: Seconds of processor time of such an import.
        disk: Free bytes where run and data lie; None: nobody says.
        stated: Sources of rates that were not measured; empty: all were measured here.
    """

    nodes: Sequence[Node]
    process: int
    start: float
    disk: int | None = None
    stated: tuple[str, ...] = ()

    @property
    def worker(self) -> int:
        """Bytes of a worker that has nothing to do yet."""
        return self.process + RAY_OF_WORKER

    def node_for(self, cpu: float, gpu: float) -> Node | None:
        """Where a worker runs that asks for so much: the node of the most memory that has it; None: nowhere."""
        fitting = [each for each in self.nodes if each.count and each.cpus >= cpu and each.gpus >= gpu]
        if not gpu:  # nodes with GPUs are for those that ask for some
            fitting = [each for each in fitting if not each.gpus] or fitting
        return max(fitting, key=lambda each: (each.memory or 0, each.cpus), default=None)


def this_machine(folder: Path | None, cpus: float, gpus: float, start: float) -> Machines:
    """This machine as it is.

    Args:
        folder: Where run and data lie; it need not be there yet. None: elsewhere.
        cpus, gpus: As Ray counts them.
        start: Seconds of processor time that this process took to import what a worker imports.
    """
    try:
        process = status_bytes("VmRSS")
    except OSError:
        process = 450 << 20
    gpu_memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    node = Node("this machine", 1, cpus, gpus, free_memory(), gpu_memory)
    return Machines([node], process, start, None if folder is None else free_disk(folder))


def free_disk(folder: Path) -> int | None:
    """Free bytes of the disk that a folder lies on, or will."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def own_cpus() -> float:
    """CPUs that this process may use."""
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
