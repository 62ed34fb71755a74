"""Workers that are lost, hang or go wrong in the middle of an epoch: the training ends as if nothing had happened."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.checkpoints import load_checkpoint
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.training.stages import CPU
from ray_jobs.cluster.failures import JobFailed
from ray_jobs.jobs import train_experts as job
from ray_jobs.jobs.train_experts import train_experts
from ray_jobs.terminal.display import Display
from tests.support.cluster.disturbed import (
    StepLog,
    assert_equal_parts,
    checkpoints,
    disturbed_config,
    noted,
    undisturbed,
    wait_stored,
)
from tests.support.displays import Lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
WORKERS = {"text": 1, "visual": 2}


@pytest.fixture(scope="module")
def config(small_config: ExperimentConfig) -> ExperimentConfig:
    return disturbed_config(small_config, workers=2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig, small_data: Dataset) -> Run:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), config, small_data)


@contextmanager
def in_background(
    config: ExperimentConfig, dataset: Dataset, folder: Path, display: Display
) -> Iterator["Future[Run]"]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train_experts, config, dataset, folder, display)


def test_killed_workers_go_on_from_their_checkpoints(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    monkeypatch.setattr(job, "worker_loop", noted(log))
    with in_background(config, small_data, tmp_path / "run", Lines()) as training:
        log.wait_held((1, 3), WORKERS, ended=training.done)
        wait_stored(tmp_path / "run", {"text": (1, 0), "visual": (1, 2)})
        event = time.time()
        os.kill(log.notes("text")[-1].pid, signal.SIGKILL)
        os.kill(log.notes("visual", rank=1)[-1].pid, signal.SIGKILL)
        run = training.result()
    assert log.cost("text", event, "killed worker, the only one; checkpoints after epochs") == 4
    assert log.cost("visual", event, "killed worker, one of two; checkpoints after 2 steps") == 2
    assert_equal_parts(run, expected)


@pytest.mark.soak
def test_hanging_workers_are_ended_and_go_on(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),), block=(2, 4))
    monkeypatch.setattr(job, "worker_loop", noted(log))
    quick = changed(config, {"parts": {"visual": {"stall_minutes": 0.25}}})
    with in_background(quick, small_data, tmp_path / "run", display := Lines()) as training:
        log.wait_held((1, 3), WORKERS, ended=training.done)
        wait_stored(tmp_path / "run", {"visual": (1, 2)})
        event = time.time()
        os.kill(log.notes("visual", rank=1)[-1].pid, signal.SIGSTOP)
        log.release((1, 3))
        run = training.result()
    assert log.cost("visual", event, "SIGSTOP of one of two workers; stall_minutes 0.25") <= 2
    assert log.blocked.exists()
    blocked = log.last_of_process("visual", 1)
    assert log.cost("visual", blocked, "one of two workers waits for data for ever; stall_minutes 0.25") <= 2
    said = [line for line in display.lines if "made no step for too long" in line]
    stacks = [path.read_text() for path in run.training_folder.glob("visual.stalled-*")]
    assert said
    assert any("in blocking" in stack for stack in stacks), said
    assert_equal_parts(run, expected)


@pytest.mark.soak
def test_a_loss_that_is_no_number_ends_the_training_with_a_sound_checkpoint(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path / "log")
    monkeypatch.setattr(job, "worker_loop", noted(log))
    wild = changed(
        config, {"train": {"learning_rate": 1e30}, "parts": {name: {"checkpoint_steps": 1} for name in WORKERS}}
    )
    display = Lines()
    with pytest.raises(JobFailed, match="failed: ") as failed:
        train_experts(wild, small_data, tmp_path / "run", display)
    assert failed.value.exit_code == 2
    run = Run.open(tmp_path / "run")
    for part in WORKERS:
        (line,) = [line for line in display.lines if line.startswith(f"  {part}: failed: ")]
        assert "in epoch 1, step 2: the training has diverged" in line
        assert [note.position for note in log.notes(part)] == [(0, 0)], "it was tried again"
        assert not run.is_finished(part)
        checkpoint = load_checkpoint(checkpoints(run, part)[-1], CPU)
        assert (checkpoint.epoch, checkpoint.step) == (0, 1)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights.values())
