"""A re-ranker on a real Ray, and the joining of two separate towers: on several workers as on one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.models.cross_encoders.blink import BI_ENCODER, CROSS_ENCODER
from dsmip.reranking.training import train_any_part
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from ray_jobs.jobs.pretrain import pretrain_backbone
from ray_jobs.jobs.train_experts import train_experts
from tests.support.displays import Lines
from tests.support.encoders.small_backbones import SMALL_BACKBONES

pytestmark = pytest.mark.usefixtures("ray_cluster")
HALF_A_CPU = {"resources": {"cpu": 0.5}}


@pytest.mark.soak
def test_a_re_ranker_is_trained_after_its_first_stage_by_workers_as_by_one(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    system: dict[str, Any] = {"pooling": "tower", "markers": [], "candidates": 4, "num_tokens": 20}
    system["template"] = {"mention": "{left} | {word} | {right}", "entity": "{name} : {attributes}"}
    tree = {
        "model": "blink",
        "backbone": {"architecture": str(narrow_backbone)},
        "system": system,
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3},
        "parts": {BI_ENCODER: HALF_A_CPU, CROSS_ENCODER: {**HALF_A_CPU, "workers": 2}},
    }
    run = train_experts(parse_config(tree), small_data, tmp_path / "run", display := Lines())
    assert sum(line.startswith(f"  {CROSS_ENCODER}: validation hits@1") for line in display.lines) == 1
    found = run.part_report(CROSS_ENCODER)

    alone = Run.create(tmp_path / "alone", run.config, small_data)
    shutil.copytree(run.folder / BI_ENCODER, alone.folder / BI_ENCODER)
    expected = train_any_part(alone, CROSS_ENCODER, LocalContext(tmp_path / "work"))
    assert [each["loss"] for each in found["history"]] == pytest.approx(
        [each["loss"] for each in expected.history], rel=1e-4
    )
    assert found["best"]["mrr"] == pytest.approx(expected.best["mrr"], rel=1e-6)

    train_experts(run.config, small_data, tmp_path / "run", display := Lines())
    assert any(line.startswith(f"  {CROSS_ENCODER}: finished already") for line in display.lines)


@pytest.mark.soak
def test_two_separate_towers_are_joined_by_workers(small_data: Dataset, tmp_path: Path) -> None:
    """Locked towers stay as they were; what joins them is trained."""
    (tmp_path / "towers").mkdir()
    architecture = SMALL_BACKBONES["separate towers"](tmp_path / "towers")
    tree = {
        "model": "clip",
        "backbone": {"architecture": architecture},
        "pretrain": {"epochs": 1, "batch_size": 4, "towers": "locked", "workers": 2, **HALF_A_CPU},
    }
    report = pretrain_backbone(parse_config(tree), small_data, tmp_path / "joined.safetensors", Lines())
    assert len(report["history"]) == 1
    before = Backbone.build(architecture, None).clip.state_dict()
    after = Backbone.build(architecture, str(tmp_path / "joined.safetensors")).clip.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed - {"logit_scale"}} == {"proj", "head"}
