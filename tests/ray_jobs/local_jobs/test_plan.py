"""`dsmip plan` on a tiny data set: systems of two kinds, its exit codes, a cluster file, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from ray_jobs.cli import app
from ray_jobs.local_jobs.planning.plan import plan
from tests.support.paths import ROOT

BLINK = {"pooling": "tower", "markers": [], "candidates": 4, "num_tokens": 20}
TEXTS = {"template": {"mention": "{left} | {word} | {right}", "entity": "{name} : {attributes}"}}


def write(path: Path, backbone: Path, model: str, system: dict[str, Any], **more: Any) -> str:
    tree = {"model": model, "backbone": {"architecture": str(backbone)}, "system": system}
    path.write_text(json.dumps({**tree, "train": {"epochs": 2, "batch_size": 8}, **more}))
    return str(path)


@pytest.mark.parametrize(
    ("model", "system", "steps"),
    [
        ("clip", {"tune": "frozen"}, ["features", "train clip", "train", "evaluate"]),
        (
            "blink",
            {**BLINK, **TEXTS},
            ["train biencoder", "train", "train crossencoder", "train", "evaluate"],
        ),
        pytest.param(
            "dsmip",
            {"gate": {"picture": "vgg16"}, "experts": {name: {} for name in ("text", "visual", "multimodal")}},
            ["features", "train text", "train visual", "train multimodal", "train", "tune", "evaluate"],
            marks=pytest.mark.slow,
        ),
        (
            "dsmip",
            {"gate": {"preset": "confidence"}, "experts": {name: {} for name in ("text", "visual", "multimodal")}},
            ["features", "train text", "train visual", "train multimodal", "train", "tune", "evaluate"],
        ),
    ],
)
def test_systems_of_other_kinds(
    model: str, system: dict[str, Any], steps: list[str], small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    """Zero-shot, with a re-ranker, and with a gate."""
    config = write(tmp_path / "config.yaml", narrow_backbone, model, system)
    found = plan(config, small_data.location, str(tmp_path), None, [], None)
    assert [step.name for step in found.forecast.steps] == steps


def test_a_larger_knowledge_base_takes_more(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    """Its index grows with it, what training mentions take does not."""
    config = write(tmp_path / "config.yaml", narrow_backbone, "clip", {"tune": "frozen"})
    options = ["--config", config, "--data", small_data.location, "--run", str(tmp_path)]
    bytes_of = []
    for more in ([], ["--entities", str(1000 * small_data.num_entities)]):
        out = tmp_path / f"{len(bytes_of)}.json"
        CliRunner().invoke(app, ["plan", *options, *more, "--json", str(out)])
        bytes_of.append({each["what"]: each["num_bytes"] for each in json.loads(out.read_text())["files"]})
    one, thousand = bytes_of
    (index,) = (name for name in one if "index" in name)
    assert thousand[index] == pytest.approx(1000 * one[index], rel=0.2)
    assert any(thousand[name] == one[name] for name in one)


def test_a_cluster_file_is_planned_for_from_stated_rates(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"clip": {"resources": {"cpu": 4, "gpu": 1}}}
    config = write(tmp_path / "config.yaml", narrow_backbone, "clip", {}, parts=parts)
    found = plan(config, small_data.location, str(tmp_path), ROOT / "cluster.yaml", [], None)
    assert {step.name: step.node for step in found.forecast.steps}["train clip"] == "gpu"
    assert all(step.seconds > 0 for step in found.forecast.steps)
    assert "stated rates, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("available_node_types: [", "is not valid YAML"),
        ("cluster_name: x", "no worker node types"),
        ("available_node_types: {gpu: {resources: {GPU: 1}}}", "node type gpu names no machine"),
        ("available_node_types: {gpu: {node_config: {InstanceType: none.such}}}", "no rates are stated of 'none.such'"),
    ],
)
def test_a_wrong_cluster_file_is_refused(text: str, message: str, small_data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        plan("demo", small_data.location, str(tmp_path), path, [], None)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_config"):
        plan("no_such_config", str(tmp_path), ".", None, [], None)
    with pytest.raises(UserError, match=str(tmp_path)):
        plan("demo", str(tmp_path), ".", None, [], None)
    with pytest.raises(UserError, match="cannot be read"):
        plan("demo", str(tmp_path), ".", tmp_path / "none.yaml", [], None)


def test_the_exit_code_is_1_where_something_does_not_fit(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    parts = {"clip": {"resources": {"cpu": 4096}}}
    config = write(tmp_path / "config.yaml", narrow_backbone, "clip", {}, parts=parts)
    found = CliRunner().invoke(app, ["plan", "--config", config, "--data", small_data.location])
    assert found.exit_code == 1
    assert "does not fit: clip asks for 4096 CPU" in found.output
