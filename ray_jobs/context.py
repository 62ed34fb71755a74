"""A training's outside world inside a Ray Train worker: checkpoints and progress through Ray."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ray.train
import ray.train.torch
import torch

from ray_jobs.progress import Event

_STEP_EVENT_SECONDS = 0.5


class RayContext:
    """`dsmip.training.Context` on Ray Train. Use as a context manager: it removes what it copied.

    events: an `EventQueue` actor. Only rank 0 sends events; the first one says that the worker has started.
    """

    def __init__(self, name: str, num_epochs: int, events: Any) -> None:
        self.device: torch.device = ray.train.torch.get_device()
        self._name, self._num_epochs = name, num_epochs
        self._events = events if ray.train.get_context().get_world_rank() == 0 else None
        self._restored = Path(tempfile.mkdtemp(prefix="dsmip-restored-"))
        self._num_steps = 1
        self._last_event = 0.0
        set_threads()
        self._send(0, 0, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._restored, ignore_errors=True)

    def step_done(self, epoch: int, step: int, num_steps: int, loss: float) -> None:
        self._num_steps = num_steps
        if time.monotonic() - self._last_event >= _STEP_EVENT_SECONDS:
            self._send(epoch, epoch * num_steps + step + 1, {})

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        epoch = int(metrics["epoch"])
        self._send(epoch, (epoch + 1) * self._num_steps, dict(metrics))
        ray.train.report(
            dict(metrics),
            checkpoint=None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def restore(self) -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.to_directory(str(self._restored)))

    def checkpoint_folder(self, epoch: int) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"dsmip-epoch-{epoch:04d}-"))  # Ray deletes it once it is stored

    def _send(self, epoch: int, done: int, metrics: dict[str, float]) -> None:
        if self._events is not None:
            self._last_event = time.monotonic()
            self._events.push.remote(Event(self._name, done, self._num_epochs * self._num_steps, epoch, metrics))


def set_threads() -> None:
    """As many threads as whole CPUs were assigned to this worker, at least one."""
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0)
    torch.set_num_threads(max(int(cpus), 1))
