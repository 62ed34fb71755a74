"""The process group of a training's workers: on a local Ray they meet by a file, for a port would listen to everybody.

PyTorch's own meeting point (TCPStore) listens on all interfaces and asks for no token. Ray's workers of one machine
all see a private folder instead.
"""

import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ray_jobs.cluster.environment import starts_own_cluster  # first: Ray reads its variables when it is imported

# isort: split
import ray
import torch.distributed as dist
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from ray_jobs.cluster.local import own_folder


def group_config(timeout_seconds: int) -> BackendConfig:
    """How several workers of a training find each other: by a file on a local Ray, else as Ray has it."""
    if starts_own_cluster():
        return FileConfig(timeout_s=timeout_seconds, folder=str(own_folder()))
    return TorchConfig(timeout_s=timeout_seconds)


@dataclass
class FileConfig(TorchConfig):
    """Workers meet by a file in a private folder that all of them see."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["_FileBackend"]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Joins all workers; each time by a new file, as lost workers may have left theirs."""
        assert isinstance(backend_config, FileConfig)
        file = Path(backend_config.folder) / f"group-{uuid.uuid4().hex}"
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        size = len(worker_group)
        joined: list[Any] = [
            worker_group.execute_single_async(number, _join, backend, number, size, str(file), backend_config.timeout_s)
            for number in range(size)
        ]
        ray.get(joined)


def _join(backend: str, number: int, size: int, file: str, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, init_method=f"file://{file}", rank=number, world_size=size, timeout=timeout)
