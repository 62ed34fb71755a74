"""A Ray worker's device and threads, as Ray assigned them."""

from collections.abc import Mapping

from ray_jobs.cluster import connection  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import ray
import torch


def worker_device() -> torch.device:
    """The GPU that Ray gave to this task or trial, else the CPU."""
    return torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


def set_threads() -> None:
    """As many threads as whole CPUs were assigned to this worker, at least one."""
    assigned: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(int(assigned.get("CPU", 0.0)), 1))
