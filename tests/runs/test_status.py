"""`dsmip status`: a run half trained, interrupted, failed, swept and damaged, always from its directory alone."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.checkpoints import Checkpoint, save_checkpoint
from dsmip.runs.run import Run
from dsmip.runs.status import Status, TrainingState, read_status
from dsmip.storage.atomic import write_json
from dsmip.storage.locations import open_run_storage

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
METRICS = {"epoch": 1.0, "loss": 0.25, "mrr": 0.5, "hits@1": 0.375}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, small_config: ExperimentConfig, small_data: Dataset) -> Path:
    return Run.create(tmp_path_factory.mktemp("fresh") / "run", small_config, small_data).folder


@pytest.fixture
def folder(fresh: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fresh, tmp_path / "run"))


def finish(folder: Path, part: str) -> None:
    write_json(folder / part / "part.json", {"best": METRICS, "history": [METRICS, METRICS]})


def progress(path: Path, age: float, state: str = "training") -> None:
    position = {
        "epoch": 1,
        "step": 3,
        "num_steps": 9,
        "num_epochs": 2,
        "updated": (NOW - timedelta(0, age)).isoformat(),
    }
    write_json(path, {**position, "state": state, "figures": {"step/loss": 0.5, "epoch/mrr": 0.25}, "where": {}})


def checkpoint(folder: Path, epoch: int) -> Path:
    save_checkpoint(folder, Checkpoint(epoch, [METRICS] * epoch, {}, {}, {}, {}, {}))
    return folder


def rows(status: Status) -> dict[str, TrainingState]:
    return {each.name: each for each in [*status.parts, *status.trials]}


def test_a_run_that_has_just_begun(folder: Path) -> None:
    status = read_status(folder)
    assert {name: row.state for name, row in rows(status).items()} == dict.fromkeys(
        ("text", "visual", "multimodal", "dsmip"), "not begun"
    )
    assert (status.model, status.problems, status.trials, status.evaluations) == ("dsmip", [], [], [])
    assert status.data.startswith("small (")
    assert status.next.startswith(f"dsmip train --config {folder / 'config.yaml'} --data ")
    assert status.disk["config.yaml"] == (folder / "config.yaml").stat().st_size


def test_parts_in_all_states(folder: Path) -> None:
    finish(folder, "text")
    checkpoint(folder / "ray" / "visual" / "checkpoint_a", 1)
    progress(folder / "ray" / "visual.progress.json", age=10)
    checkpoint(folder / "ray" / "multimodal" / "checkpoint_a", 1)
    status = read_status(folder, NOW)
    found = rows(status)
    assert found["text"] == TrainingState("text", "finished", 2, 2, figures=METRICS)
    visual = found["visual"]
    assert (visual.state, visual.epochs_done, visual.step, visual.num_steps) == ("training", 1, 3, 9)
    assert visual.figures == {"step/loss": 0.5, "epoch/mrr": 0.25}
    assert visual.note == "last sign of life 10 s ago"
    assert [found[name].epochs_saved for name in ("visual", "multimodal", "dsmip")] == [1, 1, 0]
    assert (found["multimodal"].state, found["multimodal"].figures["epoch/mrr"]) == ("interrupted", 0.5)
    assert status.next == "a training is under way: wait for it"
    assert status.problems == []
    assert rows(read_status(folder, NOW + timedelta(hours=1)))["visual"].state == "interrupted"
    assert read_status(folder, NOW + timedelta(hours=1)).next.startswith("dsmip train ")

    progress(folder / "ray" / "visual.progress.json", age=10, state="failed")
    (folder / "ray" / "visual.error.txt").write_text("Traceback")
    visual = rows(read_status(folder, NOW))["visual"]
    assert (visual.state, visual.note) == ("failed", f"see {folder / 'ray' / 'visual.error.txt'}")


def test_a_training_that_goes_on_keeps_its_checkpoint_s_position(folder: Path) -> None:
    """Its new worker has written its first sign of life, and has made no step yet."""
    checkpoint(folder / "ray" / "visual" / "checkpoint_a", 1)
    position = {"epoch": 0, "step": 0, "num_steps": 1, "num_epochs": 2, "updated": NOW.isoformat()}
    write_json(folder / "ray" / "visual.progress.json", {**position, "state": "training", "figures": {}})
    visual = rows(read_status(folder, NOW))["visual"]
    assert (visual.state, visual.epochs_done, visual.figures["epoch/mrr"]) == ("training", 1, 0.5)


def record(folder: Path, day: int, command: str, outcome: str) -> None:
    started = f"2026-05-0{day}T12:00:00+00:00"
    write_json(
        folder / "records" / f"2026050{day}T120000.000000Z-{command}.json",
        {"command": command, "started": started, "outcome": outcome},
    )


def test_what_a_running_command_has_not_begun_is_starting(folder: Path) -> None:
    """Its record says so, until nothing has shown a sign of life for so long that it may have been killed."""
    finish(folder, "text")
    progress(folder / "ray" / "visual.progress.json", age=3600)  # of an earlier call
    record(folder, 1, "train", "running")
    states = {name: row.state for name, row in rows(read_status(folder, NOW + timedelta(seconds=60))).items()}
    assert states == {"text": "finished", "visual": "starting", "multimodal": "starting", "dsmip": "not begun"}
    found = rows(read_status(folder, NOW + timedelta(seconds=60)))["multimodal"]
    assert found.note == "'dsmip train' began 60 s ago: workers start (imports, weights) or wait for room"
    assert rows(read_status(folder, NOW + timedelta(seconds=301)))["multimodal"].state == "not begun"
    progress(folder / "ray" / "visual.progress.json", age=-290)
    states = {name: row.state for name, row in rows(read_status(folder, NOW + timedelta(seconds=301))).items()}
    assert (states["visual"], states["multimodal"]) == ("training", "starting")  # it waits for room
    record(folder, 2, "train", "interrupted")
    assert rows(read_status(folder, NOW + timedelta(seconds=60)))["multimodal"].state == "not begun"


def test_a_command_whose_record_says_no_end_may_still_be_running(folder: Path) -> None:
    """It may wait for room, or validate for long: a second one would damage the run."""
    record(folder, 1, "train", "running")
    may_run = "a command may still be running ({}, begun 2026-05-0{}T12:00:00+00:00); if it is not: dsmip {} "
    train = may_run.format("train", 1, "train")
    status = read_status(folder, NOW)
    assert status.next.startswith(train)
    assert status.last_command == "train, begun 2026-05-01T12:00:00+00:00: running"
    progress(folder / "ray" / "visual.progress.json", age=1000)
    status = read_status(folder, NOW + timedelta(seconds=400))
    assert rows(status)["visual"].state == "interrupted"
    assert status.next.startswith(train)
    progress(folder / "ray" / "visual.progress.json", age=10)
    assert read_status(folder, NOW).next == "a training is under way: wait for it"

    record(folder, 2, "train", "failed: no room")  # one command at a time: the one before has ended
    assert read_status(folder, NOW + timedelta(hours=1)).next.startswith("dsmip train ")
    record(folder, 3, "tune", "running")
    sweep(folder, rungs=1)
    assert read_status(folder, NOW + timedelta(hours=1)).next.startswith(may_run.format("tune", 3, "tune"))


def test_the_next_command_of_a_run_in_a_store_names_no_file_of_this_machine(bucket: str, folder: Path) -> None:
    run, storage = f"{bucket}/run", open_run_storage(f"{bucket}/run")
    for name in ("config.yaml", "run.json"):
        storage.write_text(name, (folder / name).read_text())
    said = read_status(run).next
    assert said.startswith("dsmip train --config FILE --data ")
    assert said.endswith(f" --run {run} (FILE: a copy of {run}/config.yaml)")
    assert str(storage.folder) not in said


def sweep(folder: Path, rungs: int) -> None:
    for part in ("text", "visual", "multimodal"):
        finish(folder, part)
    trials = {str(n): {"train.learning_rate": n} for n in range(4)}
    write_json(folder / "tune" / "sweep.json", {"sha256": "x", "seed": 0, "trials": trials})
    stored = [
        {"epochs": 1, "mrr": {"0": 0.1, "1": 0.3, "2": 0.2}, "failed": {"3": "no room"}, "survivors": [1, 2]},
        {"epochs": 3, "mrr": {"1": 0.4, "2": 0.35}, "failed": {}, "survivors": [1]},
    ]
    for number, rung in enumerate(stored[:rungs]):
        write_json(folder / "tune" / f"rung-{number}.json", rung)
    progress(folder / "tune" / "trials" / "1" / "progress.json", age=1, state="training" if rungs == 1 else "finished")
    progress(folder / "tune" / "trials" / "2" / "progress.json", age=1, state="finished")


def test_trials_of_a_sweep_under_way(folder: Path) -> None:
    sweep(folder, rungs=1)
    status = read_status(folder, NOW)
    assert [row.state for row in status.trials] == ["dropped", "training", "paused", "failed"]
    assert status.trials[0].note == "train.learning_rate=0"
    assert status.trials[3].note == "train.learning_rate=3; no room"
    assert status.next.endswith("wait for it")
    assert read_status(folder, NOW + timedelta(days=1)).next == f"dsmip tune --run {folder}"


def test_a_run_that_is_finished(folder: Path) -> None:
    sweep(folder, rungs=2)
    finish(folder, "dsmip")
    status = read_status(folder, NOW)
    assert [row.state for row in status.trials] == ["dropped", "finished", "finished", "failed"]
    assert status.trials[1].figures == {"epoch/mrr": 0.4}
    assert status.next == f"dsmip evaluate --run {folder} --split test"
    overall = {"hits@1": 0.5, "mrr": 0.625}
    write_json(folder / "evaluate" / "test" / "dsmip" / "metrics.json", {"overall": overall, "mentions": 8})
    status = read_status(folder, NOW)
    assert [(each.model, each.split, each.mentions, each.figures) for each in status.evaluations] == [
        ("dsmip", "test", 8, overall)
    ]
    assert status.next == "nothing: trained, tuned and evaluated"
    assert status.problems == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"best": 3}', b"\xff\xfe"])
@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "text/part.json", "ray/visual.progress.json", "ray/visual/checkpoint_b/checkpoint.json"),
        *("tune/sweep.json", "tune/rung-0.json", "evaluate/test/text/metrics.json", "records/1-train.json"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: bytes) -> None:
    checkpoint(folder / "ray" / "visual" / "checkpoint_a", 1)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    status = read_status(folder, NOW)
    assert len([problem for problem in status.problems if str(path) in problem]) == 1
    assert rows(status)["visual"].epochs_done == 1  # of the checkpoint before


def test_a_file_that_cannot_be_read_is_not_called_damaged(folder: Path) -> None:
    finish(folder, "text")
    (folder / "text" / "part.json").unlink()
    (folder / "text" / "part.json").mkdir()
    assert f"{folder}/text/part.json cannot be read: Is a directory" in read_status(folder, NOW).problems


@pytest.mark.parametrize("content", [b"model: [", b"model: nothing", b"\xff\xfe", None])
def test_without_its_configuration_the_rest_is_told(folder: Path, content: bytes | None) -> None:
    finish(folder, "text")
    path = folder / "config.yaml"
    path.unlink() if content is None else path.write_bytes(content)
    status = read_status(folder, NOW)
    assert [str(path) in problem for problem in status.problems] == [True]
    assert [(row.name, row.state) for row in status.parts] == [("text", "finished")]
    assert "put config.yaml back" in status.next


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        read_status(tmp_path)


@pytest.mark.slow
def test_the_command_needs_neither_ray_nor_data(folder: Path) -> None:
    """Its JSON file holds what the table shows; a damaged file is no reason to fail."""
    stamp: dict[str, Any] = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", {**stamp, "data": {**stamp["data"], "folder": "/gone"}})
    sweep(folder, rungs=1)
    (folder / "text" / "part.json").write_text("{")
    code = (
        f"import sys; from ray_jobs import cli; sys.argv = ['dsmip', 'status', '{folder}', '--json', '{folder}.json']\n"
        "try: cli.main()\nfinally: print('ray' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[-1] == "False"
    assert any(line.split()[:2] == ["visual", "finished"] and "hits@1 0.375" in line for line in lines)
    assert f"problem: {folder / 'text' / 'part.json'} is damaged" in run.stdout
    written = json.loads(Path(f"{folder}.json").read_text())
    assert [part["name"] for part in written["parts"]] == ["text", "visual", "multimodal", "dsmip"]
    assert f"next: {written['next']}" in lines
