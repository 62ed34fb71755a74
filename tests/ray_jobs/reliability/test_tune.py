"""A sweep whose trial and whose command are killed: only what was not finished is done again, with the same outcome."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig, TuneConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from ray_jobs.jobs.tune_gate import tune_gate
from ray_jobs.terminal.display import Display
from tests.support.cluster.disturbed import NOTED_JOB, WAIT_SECONDS, StepLog, command, descendants, ended, is_alive
from tests.support.cluster.ray_heads import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]
SPACE = {"system.gate.temperature": {"values": [0.1, 0.5, 1.0]}, "train.learning_rate": {"loguniform": [1e-3, 1e-2]}}


@pytest.fixture
def trained(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset) -> Path:
    """A run whose experts are finished. Its sweep has three trials of an epoch, and the best go on to three epochs."""
    train = {"epochs": 3, "batch_size": 4}
    plan = TuneConfig(trials=3, rungs=(1, 3), reduction=2, resources={"cpu": 0.5}, space=SPACE, train=train)
    run = Run.create(tmp_path / "trained", small_config.model_copy(update={"tune": plan}), small_data)
    for part in run.part_names:
        train_part(run, part, LocalContext(tmp_path / f"checkpoints-{part}"))
    return run.folder


def test_only_what_a_killed_trial_and_a_killed_sweep_had_not_finished_is_done_again(
    trained: Path, tmp_path: Path
) -> None:
    calm = Run.open(shutil.copytree(trained, tmp_path / "calm"))
    expected = tune_gate(calm, calm.config, Display())
    run = Run.open(shutil.copytree(trained, tmp_path / "run"))
    best, others = expected["trial"], {0, 1, 2} - {expected["trial"]}
    name = f"trial {best}"
    log = StepLog(tmp_path / "log", holds=((0, 2), (1, 1)), only=name)
    log.folder.mkdir()
    arguments = ["-m", NOTED_JOB, log.to_json(), "tune", "--run", str(run.folder)]
    trials = run.folder / "tune" / "trials"
    with command(arguments) as process:
        log.wait_held((0, 2), {name: 1}, ended=process.poll)
        done = [trials / str(number) / "result.json" for number in others]
        wait_until(lambda: all(path.is_file() for path in done), WAIT_SECONDS, "the other trials do not end")
        started = descendants(process.pid)
        process.kill()
        wait_until(lambda: not any(map(is_alive, started)), WAIT_SECONDS, "processes of the killed sweep stay")
    log.release((0, 2))
    finished = {path: path.stat().st_mtime_ns for path in _finished(run)}
    sweep_killed = time.time()
    with command(arguments) as process:
        log.wait_held((1, 1), {name: 1}, ended=process.poll)
        trial_killed = time.time()
        os.kill(log.notes(name)[-1].pid, signal.SIGKILL)
        code, output = ended(process)
    assert code == 0, output
    assert run.part_report("dsmip") == expected
    assert {path: path.stat().st_mtime_ns for path in _finished(run)} == finished
    for number in others:
        positions = [note.position for note in log.notes(f"trial {number}")]
        assert len(positions) == len(set(positions)), f"trial {number} did epochs again that were finished"
    assert log.cost(name, sweep_killed, "killed sweep; from the next command on") == 3
    assert log.cost(name, trial_killed, "killed trial") == 2


def _finished(run: Run) -> list[Path]:
    """What is not to be made again: the experts and their feature tables."""
    parts = [run.folder / part / "weights.safetensors" for part in run.part_names]
    return [
        *parts,
        *(path for path in (run.folder / "features").rglob("*") if path.is_file() and path.suffix != ".lock"),
    ]
