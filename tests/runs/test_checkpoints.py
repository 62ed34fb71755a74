"""Damaged checkpoints: whatever byte is wrong is noticed, the file is named, and the one before it is used."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmip.errors import UserError
from dsmip.runs.checkpoints import Checkpoint, load_checkpoint, newest_sound, save_checkpoint

CPU = torch.device("cpu")
FILES = ["weights.safetensors", "best.safetensors", "optimizer.pt", "checkpoint.json"]


def written(folder: Path, epoch: int = 3) -> Path:
    weights = {"unit": torch.arange(6.0).view(2, 3)}
    history = [{"epoch": 0.0, "loss": 0.25, "mrr": 0.5}]
    state = {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-3}]}
    save_checkpoint(folder, Checkpoint(epoch, history, weights, weights, state, {"last_epoch": 4}, {}))
    return folder


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    stored = load_checkpoint(written(tmp_path / "a"), CPU)
    assert (stored.epoch, stored.history) == (3, [{"epoch": 0.0, "loss": 0.25, "mrr": 0.5}])
    assert torch.equal(stored.weights["unit"], torch.arange(6.0).view(2, 3))
    assert stored.optimizer["param_groups"] == [{"lr": 1e-3}]
    assert stored.schedule == {"last_epoch": 4}


def test_hard_negatives_come_back_and_are_checked_like_the_rest(tmp_path: Path) -> None:
    rows, state = torch.tensor([[4, 2], [7, -1]]), {"state": {}, "param_groups": []}
    weights = {"unit": torch.zeros(2)}
    save_checkpoint(tmp_path, Checkpoint(1, [], weights, weights, state, {}, {}, hard_row_NK=rows))
    found = load_checkpoint(tmp_path, CPU).hard_row_NK
    assert found is not None
    assert torch.equal(found, rows)
    (tmp_path / "hard_negatives.safetensors").unlink()
    with pytest.raises(UserError, match=r"hard_negatives\.safetensors is missing"):
        load_checkpoint(tmp_path, CPU)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_flipped_bit_or_lost_end_is_noticed(tmp_path: Path, name: str, share: float, bit: int, cut: bool) -> None:
    path = written(tmp_path / "a") / name
    content = bytearray(path.read_bytes())
    position = int(share * len(content))
    if name == "checkpoint.json":
        position = min(position, len(content) - 4)  # the last line's end is layout, not content
    if cut:
        content = content[:position]
    else:
        content[position] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path / "a", CPU)


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_is_named(tmp_path: Path, name: str) -> None:
    (written(tmp_path / "a") / name).unlink()
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path / "a", CPU)


def spoil(folder: Path, change: Callable[[bytes], bytes] = lambda content: content[:-1]) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(change(path.read_bytes()))


def test_the_newest_sound_one_is_chosen(tmp_path: Path) -> None:
    folders = [written(tmp_path / name) for name in ("newest", "middle", "oldest")]
    said: list[str] = []
    assert newest_sound(iter([]), CPU, said.append, "x") is None
    assert newest_sound(folders, CPU, said.append, "x") == folders[0]
    assert said == []
    spoil(folders[0])
    (folders[1] / "checkpoint.json").write_text("{}")
    assert newest_sound(folders, CPU, said.append, "x") == folders[2]
    assert len(said) == 2
    assert "newest/weights.safetensors is damaged" in said[0]
    assert "middle/checkpoint.json is damaged" in said[1]
    spoil(folders[2])
    with pytest.raises(UserError, match=r"no checkpoint can be read: .*oldest.*Delete run/ray/text to train this anew"):
        newest_sound(folders, CPU, said.append, "run/ray/text")
