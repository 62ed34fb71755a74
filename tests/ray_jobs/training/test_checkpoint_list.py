"""Ray's list of checkpoints, cut off by a kill or a full disk: it is made anew from the complete checkpoints."""

import json
from pathlib import Path

import pytest

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)
from dsmip.runs.checkpoints import Checkpoint, save_checkpoint
from ray_jobs.training.checkpoint_list import SNAPSHOT, mend_snapshot

# isort: split
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, one of them without its manifest; their names are not in the order of their steps."""
    for name, epoch, step in (("checkpoint_b", 1, 2), ("checkpoint_a", 2, 0), ("checkpoint_c", 2, 1)):
        save_checkpoint(tmp_path / name, Checkpoint(epoch, [], {}, {}, {}, {}, {}, step=step))
    (tmp_path / "checkpoint_c" / "checkpoint.json").unlink()
    return tmp_path


@pytest.mark.parametrize("content", ["", '{"ray_version": "2', "[]", '{"checkpoint_results": [{}]}'])
def test_a_broken_list_names_the_complete_checkpoints_again(folder: Path, content: str) -> None:
    (folder / SNAPSHOT).write_text(content)
    assert "is damaged; it was made anew with 2 checkpoints" in mend_snapshot(folder)
    state = _CheckpointManagerState.model_validate(json.loads((folder / SNAPSHOT).read_text()))
    assert [each.checkpoint_dir_name for each in state.checkpoint_results] == ["checkpoint_b", "checkpoint_a"]
    assert state.latest_checkpoint_result == state.checkpoint_results[-1]
    assert len(state.checkpoint_report_indices) == state.current_report_index == 2
    written = (folder / SNAPSHOT).read_bytes()
    assert mend_snapshot(folder) == ""
    assert (folder / SNAPSHOT).read_bytes() == written


def test_a_list_that_names_a_lost_checkpoint_is_mended(folder: Path) -> None:
    (folder / SNAPSHOT).write_text("")
    mend_snapshot(folder)
    for path in (folder / "checkpoint_b").iterdir():
        path.unlink()
    (folder / "checkpoint_b").rmdir()
    assert "names checkpoint_b, which is lost; it was made anew with 1 checkpoints" in mend_snapshot(folder)


def test_a_half_copied_checkpoint_is_not_named(folder: Path) -> None:
    """Ray copies a folder's files in any order: the manifest may be there before the rest."""
    (folder / "checkpoint_a" / "weights.safetensors").write_bytes(b"")
    (folder / SNAPSHOT).write_text("")
    assert "it was made anew with 1 checkpoints" in mend_snapshot(folder)
    (named,) = json.loads((folder / SNAPSHOT).read_text())["checkpoint_results"]
    assert named["checkpoint_dir_name"] == "checkpoint_b"


def test_without_any_checkpoint_the_training_begins_anew(tmp_path: Path) -> None:
    assert mend_snapshot(tmp_path) == ""
    (tmp_path / SNAPSHOT).write_text("")
    assert "0 checkpoints" in mend_snapshot(tmp_path)
    assert list(tmp_path.iterdir()) == []
