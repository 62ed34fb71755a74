"""Faults that are not a trial's own doing: a sweep ends without a decision, and the next command makes it."""

import contextlib
import errno
import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsmip.config import ExperimentConfig, TuneConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import StoreAway, UserError
from dsmip.runs.load_config import to_yaml
from dsmip.runs.loaded_model import WEIGHTS
from dsmip.runs.run import Run
from dsmip.storage.run_storage import LocalRun
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import CPU, train_part
from ray_jobs.cluster.events import StepEvents
from ray_jobs.cluster.failures import JobFailed
from ray_jobs.jobs import tune_gate as job
from ray_jobs.jobs.tune_gate import tune_gate
from ray_jobs.terminal.display import Display
from ray_jobs.training import sweep, trial
from ray_jobs.training.sweep import decided, trial_outcome
from ray_jobs.training.trial import RESULT, TrialContext, TrialTask, guarded_trial
from tests.support.displays import Lines

SPACE = {"system.gate.temperature": {"values": [0.1, 0.5, 1.0]}, "train.learning_rate": {"loguniform": [1e-3, 1e-2]}}


@pytest.fixture
def run(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset) -> Run:
    """Its sweep has three trials of an epoch."""
    train = {"epochs": 1, "batch_size": 8}
    plan = TuneConfig(trials=3, rungs=(1,), resources={"cpu": 1}, space=SPACE, train=train)
    return Run.create(tmp_path / "run", small_config.model_copy(update={"tune": plan}), small_data)


def task_of(run: Run, number: int) -> TrialTask:
    """A trial that finds none of its features."""
    return TrialTask(number, run.storage.location, run.dataset.location, to_yaml(run.config), 1, {})


def faulty_trial(fault: Path, config: dict[str, int], tasks: Any, events: Any) -> None:
    """A sweep's own trial. While the file is there trial 1 fails in the way that the file's name says."""
    from ray_jobs.training import sweep, trial

    run_trial = trial.run_trial

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/weights")

    if config["number"] == 1 and fault.exists():
        if fault.name == "lost":
            os.kill(os.getpid(), signal.SIGKILL)
        trial.run_trial = full  # type: ignore[assignment]
    try:
        sweep.tune_trial(config, tasks, events)
    finally:
        trial.run_trial = run_trial  # the process may have other trials


def lost_once(mark: Path, *arguments: Any) -> Any:
    """Computes features; the process is lost the first time."""
    with contextlib.suppress(FileExistsError):
        mark.touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return trial.cache_features(*arguments)


@pytest.mark.soak
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("fault", "said", "exit_code"),
    [
        ("full", "trial 1: failed: no space left on the disk of /data/weights; make room there", 2),
        ("lost", "trial 1: failed: its process was lost", 1),
    ],
)
def test_no_rung_is_decided_without_a_trial_that_could_not_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str, exit_code: int
) -> None:
    """Nor is anything lost that was finished; features whose process is lost are made again at once."""
    for part in run.part_names:
        train_part(run, part, LocalContext(tmp_path / f"checkpoints-{part}"))
    monkeypatch.setattr(job, "cache_features", lambda *arguments: lost_once(tmp_path / "killed", *arguments))
    monkeypatch.setattr(sweep, "tune_trial", partial(faulty_trial, tmp_path / fault))
    (tmp_path / fault).touch()
    with pytest.raises(JobFailed, match=r"^failed: trial 1; run the same command again to resume$") as failed:
        tune_gate(run, run.config, display := Lines())
    assert failed.value.exit_code == exit_code
    assert any(line.strip().startswith(said) for line in display.lines)
    assert not (run.folder / "tune" / "rung-0.json").exists()
    assert (tmp_path / "killed").exists()
    results = run.folder / "tune" / "trials"
    finished = {path: path.stat().st_mtime_ns for path in results.glob("[02]/*.*") if path.name in (RESULT, WEIGHTS)}
    assert len(finished) == 4

    (tmp_path / fault).unlink()
    assert set(tune_gate(run, run.config, Display())["mrr"]) == {"0", "1", "2"}
    assert json.loads((run.folder / "tune" / "rung-0.json").read_text())["failed"] == {}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished trial was done again"


def test_whose_doing_a_failure_is_decides(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(metrics: dict[str, Any] | None, error: Exception | None = None) -> Any:
        return trial_outcome(SimpleNamespace(metrics=metrics, error=error))

    def failing(error: Exception) -> Any:
        def fail(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(trial, "run_trial", fail)
        return end(guarded_trial(task_of(run, 1), None))

    wrong, diverged = failing(RuntimeError("no such shape")), failing(UserError("the training has diverged"))
    said = f"RuntimeError: no such shape (see {run.folder}/tune/trials/1/error.txt)"
    ends = {0: end({"mrr": 0.5}), 1: wrong, 2: diverged}
    failed = {1: said, 2: "the training has diverged"}
    assert decided(ends, Display()) == {"mrr": {0: 0.5}, "failed": failed}
    with pytest.raises(JobFailed, match="all trials failed; trial 2: the training has diverged") as ended:
        decided({2: diverged}, Display())
    assert ended.value.exit_code == 2

    away = failing(StoreAway("s3://b/run: cannot be reached"))
    lost = end(None, RuntimeError("The actor died.\n\tactor_id: 1"))
    for passing in ({3: away}, {3: lost}, {3: lost, 4: away}):
        names = ", ".join(f"trial {number}" for number in passing)
        with pytest.raises(JobFailed, match=f"failed: {names}; run the same command again") as ended:
            decided({**ends, **passing}, display := Lines())
        assert ended.value.exit_code == 1
        assert len(display.lines) == len(passing)
    assert display.lines[0] == "  trial 3: failed: its process was lost: The actor died. actor_id: 1"


def test_checkpoints_wait_for_a_store_that_is_away_until_the_rung_ends(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(run, 7)
    said: list[str] = []
    sent: list[str] = []
    away = True

    def replace(storage: LocalRun, name: str) -> None:
        if away:
            raise StoreAway(f"{storage}: cannot be reached")
        sent.append(name)

    monkeypatch.setattr(LocalRun, "replace", replace)
    monkeypatch.setattr(trial, "SEND_SECONDS", 0.0)
    monkeypatch.setattr(StepEvents, "warn", lambda events, line: said.append(line))

    def context() -> TrialContext:
        return TrialContext(task, LocalRun(tmp_path / "sweep"), run.config, 4, None, CPU)

    with context() as trained_on:
        for epoch in range(2):
            trained_on.epoch_done({"epoch": epoch, "mrr": 0.5}, None)
        assert len(said) == 1
        assert said[0].endswith("/tune/trials/7 cannot be reached; checkpoints are sent there later")
        away = False
        trained_on.epoch_done({"epoch": 2, "mrr": 0.5}, None)
        assert sent == ["checkpoints"]
        away = True
        trained_on.epoch_done({"epoch": 3, "mrr": 0.5}, None)
        assert len(said) == 2
        away = False
    assert len(sent) == 2
    away = True
    with pytest.raises(StoreAway), context():
        pass
