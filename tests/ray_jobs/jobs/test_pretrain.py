"""The job `pretrain` without a cluster: what it writes, what it keeps, and what it does not overwrite."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dsmip.config import ExperimentConfig, merged
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.training.local_context import LocalContext
from ray_jobs.jobs import pretrain
from ray_jobs.jobs.pretrain import pretrain_backbone
from ray_jobs.terminal.display import Display
from ray_jobs.training.ray_train import Training


class Lab:
    """Pretrains into one file in this process, and counts the trainings."""

    def __init__(self, folder: Path, config: ExperimentConfig, dataset: Dataset) -> None:
        self.config, self.dataset = merged(config, {"system": config.system, "pretrain": {"epochs": 1}}), dataset
        self.out, self.num_trainings = folder / "backbone.safetensors", 0

    def train_here(self, trainings: Sequence[Training], display: Display) -> None:
        for training in trainings:
            training.loop(LocalContext(training.location), training.settings)  # type: ignore[arg-type]
            self.num_trainings += 1

    def pretrain(self, **changes: Any) -> dict[str, Any]:
        system = merged(self.config.system, changes.get("system", {}))
        config = merged(self.config, {**changes, "system": system})
        return pretrain_backbone(config, self.dataset, self.out, Display())


@pytest.fixture
def lab(tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab(tmp_path, small_config, small_data)
    monkeypatch.setattr(pretrain, "connected", lambda *, verbose: nullcontext())
    monkeypatch.setattr(pretrain, "run_trainings", lab.train_here)
    return lab


def test_a_folder_that_cannot_be_made_is_said_before_anything_starts(lab: Lab) -> None:
    (lab.out.parent / "file").touch()
    lab.out = lab.out.parent / "file" / "backbone.safetensors"
    with pytest.raises(OSError, match=r"/file'$"):
        lab.pretrain()
    assert lab.num_trainings == 0


def test_a_folder_that_may_not_be_written_into_is_said_before_anything_starts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=f"^--out {lab.out}: this user may not write into {lab.out.parent}$"):
        lab.pretrain()
    assert lab.num_trainings == 0


def test_finished_weights_are_kept_and_deleted_ones_made_again(lab: Lab) -> None:
    report = lab.pretrain()
    assert len(report["history"]) == 1
    Backbone.build(lab.config.backbone.architecture, str(lab.out))
    assert sorted(path.name for path in lab.out.parent.iterdir()) == [
        "backbone.safetensors",
        "backbone.safetensors.json",
    ]
    written = lab.out.read_bytes()
    assert lab.pretrain(pretrain={"resources": {"cpu": 2}}) == report
    assert lab.num_trainings == 1
    lab.out.unlink()
    assert lab.pretrain() == report
    assert lab.num_trainings == 2
    assert lab.out.read_bytes() == written


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"pretrain": {"epochs": 2}},
        {"system": {"template": {"entity": "{name}, that is {attributes}"}}},
    ],
)
def test_weights_of_other_settings_are_refused(lab: Lab, changes: dict[str, Any]) -> None:
    lab.pretrain()
    with pytest.raises(UserError, match=r"backbone\.safetensors was made from other settings or data"):
        lab.pretrain(**changes)
    assert lab.num_trainings == 1
    lab.out.unlink()
    lab.pretrain(**changes)
    assert lab.num_trainings == 2


def test_a_file_of_somebody_else_is_refused(lab: Lab) -> None:
    lab.out.write_bytes(b"precious")
    with pytest.raises(UserError, match="was not made by 'dsmip pretrain'"):
        lab.pretrain()
    assert lab.out.read_bytes() == b"precious"
