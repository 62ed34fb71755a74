"""`dsmip clean`: checkpoints that nothing needs any more go, and nothing else."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dsmip.errors import UserError
from dsmip.runs.status import read_status
from ray_jobs.local_jobs.status import clean_run, show_status
from tests.support.old_run import unpack

TRIALS = [f"tune/trials/{number}/checkpoints" for number in (0, 1)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with the checkpoints that its trainings, one of another configuration's part too, have left."""
    run = unpack(tmp_path) / "run"
    shutil.rmtree(run / "ray", ignore_errors=True)
    (variant,) = run.glob("variants/*")
    for training in ("text", "visual", "multimodal", f"variants/{variant.name}/ray/multimodal-{variant.name}"):
        folder = run / training if "/" in training else run / "ray" / training
        (folder / "checkpoint_1").mkdir(parents=True)
        (folder / "checkpoint_1" / "weights.safetensors").write_bytes(bytes(1000))
    for trial in TRIALS:
        (run / trial).mkdir(parents=True, exist_ok=True)
        (run / trial / "weights.safetensors").write_bytes(bytes(500))
    return run


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_what_is_finished_loses_its_checkpoints_and_all_else_stays(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    show_status(run)
    assert f"are checkpoints that nothing needs any more: dsmip clean {run}" in capsys.readouterr().out
    clean_run(run)
    assert "MiB deleted that nothing needs any more" in capsys.readouterr().out
    gone = before - files(run)
    assert gone == {name for name in before if "/checkpoint_" in name or "/checkpoints/" in name}
    assert len(gone) >= 6
    assert read_status(run).next == "nothing: trained, tuned and evaluated"
    assert read_status(run).removable == {}


def test_what_is_not_finished_keeps_them(run: Path) -> None:
    (run / "text" / "part.json").unlink()
    (run / "dsmip" / "part.json").unlink()
    kept = {name for name in files(run) if name.startswith(("ray/text/", "tune/"))}
    clean_run(run)
    assert kept <= files(run)
    assert not (run / "ray" / "visual").exists()


def test_trials_of_a_sweep_that_has_not_ended_keep_them_beside_an_earlier_sweep_s_system(run: Path) -> None:
    sweep = json.loads((run / "tune/sweep.json").read_text())
    (run / "tune/sweep.json").write_text(json.dumps({**sweep, "sha256": "of another"}))
    kept = {name for name in files(run) if name.startswith("tune/")}
    clean_run(run)
    assert kept <= files(run)
    assert not (run / "ray" / "visual").exists()


def test_a_run_that_is_being_trained_is_left_alone(run: Path) -> None:
    (run / "text" / "part.json").unlink()
    sign = {"epoch": 0, "step": 1, "num_steps": 4, "num_epochs": 2, "state": "training", "figures": {}}
    sign["updated"] = datetime.now(UTC).isoformat()
    (run / "ray" / "text.progress.json").write_text(json.dumps(sign))
    before = files(run)
    with pytest.raises(UserError, match="text is being trained; wait for it, then clean"):
        clean_run(run)
    assert before <= files(run)


def test_what_cannot_be_deleted_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, or on a disk that is read only: it was said to be deleted."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    with pytest.raises(UserError, match=r"ray/text.* cannot be deleted"):
        clean_run(run)
    assert (run / "ray" / "text").is_dir()
