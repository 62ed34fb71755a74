"""The context of a training inside a Ray worker: device, threads, checkpoints and events."""

import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import ray.train
import ray.train.torch
import torch

from dsmip import distributed
from dsmip.runs.checkpoints import newest_sound, read_manifest
from dsmip.runs.status import PROGRESS
from dsmip.storage.run_storage import RunStorage
from dsmip.training.loop import Left
from dsmip.training.monitor import StepFigures, Watch
from dsmip.training.trackers import ProgressFile, Sent, Watched
from ray_jobs.cluster.events import StepEvents, say
from ray_jobs.cluster.scratch import Scratch
from ray_jobs.cluster.workers import set_threads
from ray_jobs.training.gauges import Gauges
from ray_jobs.training.stalls import StallWatch, collect_stalled, stall_file

_NOTICE_SECONDS = 1.0  # between two looks for a notice that a machine will be taken away


class RayContext:
    """`dsmip.training.loop.Context` on Ray Train; a context manager that removes what it copied and ends the watch.

    events: an `EventQueue` actor. storage: of the files beside the checkpoints: `<name>.progress.json` for
    `dsmip status`, and where each worker was when it was ended because it made no step for `stall_seconds`.
    Only rank 0 tells of steps and writes the progress; every worker has gauges.
    """

    def __init__(
        self, watched: Watched, num_epochs: int, events: Any, storage: RunStorage, stall_seconds: float
    ) -> None:
        self.device: torch.device = ray.train.torch.get_device()
        context = ray.train.get_context()
        rank, num_workers = context.get_world_rank(), context.get_world_size()
        self._name, self._queue = watched.name, events if rank == 0 else None
        self._events = StepEvents(watched.name, num_epochs, self._queue)
        self._features: StepEvents | None = None
        progress = storage, f"{watched.name}.{PROGRESS}"
        self._watch = open_watch(
            watched, self.device, num_epochs, progress, self._events, rank=rank, num_workers=num_workers
        )
        self._scratch = Scratch()
        self._restored = self._scratch.folder("restored-")
        self._checkpoints = storage / watched.name
        for path in collect_stalled(storage, watched.name):
            say(events, watched.name, f"a worker made no step for too long and was ended; {path} has what it did")
        distributed.any_worker(False, self.device)  # all have collected: from here on such files are of these workers
        self._stalls = StallWatch(stall_file(storage.folder, watched.name, rank), stall_seconds)
        self._next_notice = time.monotonic()
        set_threads()
        self.alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._stalls.close()
        left = kind is not None and issubclass(kind, Left)
        if left:
            ray.train.get_all_reported_checkpoints()  # waits until all are stored
        self._watch.close("left" if left else "failed" if kind else "finished")
        shutil.rmtree(self._restored, ignore_errors=True)

    def alive(self) -> None:
        self._stalls.alive()
        self._watch.alive()

    def warn(self, line: str) -> None:
        self._events.warn(line)

    def features_done(self, done: int, total: int) -> None:
        if self._features is None:
            self._features = StepEvents(f"{self._name} features", 1, self._queue)
        self._features.step_done(0, done - 1, total)

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        self._stalls.alive()
        self._events.step_done(epoch, step, num_steps)
        self._watch.step_done(epoch, step, num_steps, figures)

    def asked_to_leave(self) -> bool:
        """Asks Ray about once a second: an answer takes a call to another process, which all workers must make.

        Workers then leave by returning, all of them: one that raises, or whose process ends, has failed for Ray.
        """
        due = time.monotonic() >= self._next_notice
        if not distributed.any_worker(due, self.device):
            return False
        self._next_notice = time.monotonic() + _NOTICE_SECONDS
        return ray.train.get_preemption_info() is not None

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        self._report({"epoch": epoch, "step": step}, checkpoint)

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self._stalls.alive()
        self._events.epoch_done(metrics)
        self._watch.epoch_done(metrics)
        self._report(metrics, checkpoint)

    def _report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        ray.train.report(
            dict(metrics),
            checkpoint=None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def restore(self) -> Path | None:
        newest = ray.train.get_checkpoint()
        if newest is None:
            return None
        found = newest_sound(self._fetched(newest), self.device, self._events.warn, str(self._checkpoints))
        self._say_where(found)
        return found

    def _say_where(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            found = read_manifest(checkpoint)
            self._events.warn(f"goes on from its checkpoint: epoch {found['epoch'] + 1}, after {found['step']} steps")

    def _fetched(self, newest: ray.train.Checkpoint) -> Iterator[Path]:
        """Local copies of the checkpoints that Ray keeps, newest first, each made when it is asked for."""
        yield self._fetch(newest)
        for reported in reversed(ray.train.get_all_reported_checkpoints()):
            if reported.checkpoint.path != newest.path:
                yield self._fetch(reported.checkpoint)

    def _fetch(self, checkpoint: ray.train.Checkpoint) -> Path:
        return Path(checkpoint.to_directory(str(self._restored / Path(checkpoint.path).name)))

    def checkpoint_folder(self, epoch: int, step: int) -> Path:
        """Given when the checkpoint before it is stored: else a slow store would fill this machine's disk with them.

        Only the first worker asks for one; the others wait for it in `ray.train.report`.
        """
        ray.train.get_all_reported_checkpoints()  # waits until all are stored
        return self._scratch.folder(f"epoch-{epoch:04d}-{step}-")  # Ray deletes it once it is stored


def open_watch(
    watched: Watched,
    device: torch.device,
    num_epochs: int,
    progress: tuple[RunStorage, str],
    events: StepEvents,
    *,
    rank: int = 0,
    num_workers: int = 1,
) -> Watch:
    """Ray's gauges, and on the first worker also the progress file and the tools that were asked for.

    Raises:
        UserError: For a tool that is not installed here.
    """
    gauges = Gauges(watched.name, rank)
    if rank > 0:
        return Watch([gauges], device, events.warn)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = {"host": socket.gethostname(), "device": name, "workers": num_workers}
    storage, file = progress
    sent = [Sent(storage, file), Sent(watched.storage, watched.event_files)]
    progress_file = ProgressFile(storage.folder / file, num_epochs, where)
    return Watch([progress_file, gauges, *watched.writers(), *sent], device, events.warn)
