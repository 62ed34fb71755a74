"""What a training on Ray tells the outside, without a cluster: signs of life, addresses, who was ended before it."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)

# isort: split
import ray.train
import ray.train.torch
import torch

from dsmip.config import ExperimentConfig
from dsmip.errors import UserError
from dsmip.runs.load_config import to_yaml
from dsmip.runs.status import PROGRESS
from dsmip.storage.locations import open_run_storage
from dsmip.storage.run_storage import LocalRun, RunStorage
from dsmip.training.monitor import StepFigures
from dsmip.training.trackers import Watched
from ray_jobs.cluster.events import Event
from ray_jobs.training import context as contexts
from ray_jobs.training.context import RayContext
from ray_jobs.training.stalls import collect_stalled, stall_file
from ray_jobs.training.trial import TrialContext, TrialTask

CPU = torch.device("cpu")
STALL_SECONDS = 1000.0


class Events:
    """In the place of an `EventQueue` actor: keeps the lines, and how far what is."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[tuple[str, int, int]] = []
        self.push = SimpleNamespace(remote=self._add)

    def _add(self, event: Event) -> None:
        self.lines.append(event.note)
        self.progress.append((event.name, event.done, event.total))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """This process is a worker of Ray Train, of the `rank` that the test sets."""
    found = SimpleNamespace(rank=0)
    found.get_world_rank, found.get_world_size = lambda: found.rank, lambda: 2
    monkeypatch.setattr(ray.train, "get_context", lambda: found)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: CPU)
    monkeypatch.setattr(contexts, "set_threads", lambda: None)
    return found


def opened(storage: RunStorage, events: Events) -> RayContext:
    return RayContext(Watched(storage, "text"), 4, events, storage, STALL_SECONDS)


def progress(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "text.progress.json").read_text())
    return found


def test_a_worker_says_at_once_that_it_trains(tmp_path: Path, worker: SimpleNamespace) -> None:
    with opened(LocalRun(tmp_path), Events()) as context:
        found = progress(tmp_path)
        assert (found["state"], found["step"], found["num_epochs"]) == ("training", 0, 4)
        (tmp_path / "text.progress.json").unlink()
        context.alive()  # within a minute of the last sign of life
        assert not (tmp_path / "text.progress.json").exists()
    assert progress(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_worker_tells_how_far_features_are(tmp_path: Path, worker: SimpleNamespace, rank: int) -> None:
    worker.rank, events = rank, Events()
    with opened(LocalRun(tmp_path), events) as context:
        for done in (4, 8, 10):
            context.features_done(done, 10)
    told = [(done, total) for name, done, total in events.progress if name == "text features"]
    assert told[-1:] == ([(10, 10)] if rank == 0 else [])


def test_a_training_that_fails_with_its_device_ends_as_any_other(
    tmp_path: Path, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    unreadable = torch.empty((), device="meta")
    context = opened(LocalRun(tmp_path), Events())
    assert list(temporary.rglob("restored-*"))
    context.step_done(0, 0, 3, StepFigures(0.5, unreadable, 0.01, 8, 2.0, 0.5))
    with pytest.raises(ValueError, match="the first error"), context:
        raise ValueError("the first error")
    assert progress(tmp_path)["state"] == "failed"
    assert not list(temporary.rglob("restored-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_tells_of_those_that_were_ended_on_its_node(
    tmp_path: Path, worker: SimpleNamespace, rank: int
) -> None:
    stall_file(tmp_path, "text", 1).write_text("Thread 0x1 (most recent call first)")
    worker.rank = rank
    for said in (1, 0):  # it is told once
        events = Events()
        with opened(LocalRun(tmp_path), events):
            pass
        lines = [line for line in events.lines if line]
        assert (
            lines
            == [
                f"a worker made no step for too long and was ended; {tmp_path / 'text.stalled-1.ended'} has what it did"
            ]
            * said
        )


def test_what_another_worker_of_the_node_has_just_taken_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(3):
        stall_file(tmp_path, "text", rank).write_text("Thread" if rank else "")  # the first one's worker was killed
    glob = Path.glob

    def glob_and_lose_one(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(glob(folder, pattern))
        stall_file(tmp_path, "text", 1).unlink()
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob_and_lose_one)
    assert collect_stalled(LocalRun(tmp_path), "text") == [f"{tmp_path}/text.stalled-2.ended"]


def test_the_folder_to_delete_has_the_store_s_address(
    bucket: str, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_run_storage(f"{bucket}/run/ray")
    storage.write_text("text/checkpoint_a/checkpoint.json", "{}")
    path, file_system = storage.arrow_filesystem()
    damaged = ray.train.Checkpoint(f"{path}/text/checkpoint_a", filesystem=file_system)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: damaged)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", list)
    said = f"Delete {bucket}/run/ray/text to train this anew"
    with opened(storage, Events()) as context, pytest.raises(UserError, match=said):
        context.restore()


@pytest.fixture
def trial(bucket: str, small_config: ExperimentConfig) -> tuple[TrialTask, TrialContext]:
    task = TrialTask(3, f"{bucket}/run", f"{bucket}/data", to_yaml(small_config), 2, {})
    return task, TrialContext(task, open_run_storage(task.root), small_config, 2, Events(), CPU)


def test_a_trial_says_at_once_that_it_trains(trial: tuple[TrialTask, TrialContext]) -> None:
    task, context = trial
    with context:
        found = json.loads((task.storage.folder / PROGRESS).read_text())
        assert (found["state"], found["step"]) == ("training", 0)


def test_the_folder_of_a_trial_to_delete_has_the_store_s_address(trial: tuple[TrialTask, TrialContext]) -> None:
    task, context = trial
    task.storage.write_text("checkpoints/epoch-0001-step-0000000/checkpoint.json", "{}")
    said = f"Delete {task.root}/tune/trials/3/checkpoints to train this anew"
    with context, pytest.raises(UserError, match=said):
        context.restore()
