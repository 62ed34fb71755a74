"""The demo from drawn data to the comparison, at a small size; and its way of resuming."""

import json
import shlex
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from data_prep.demo.release import DemoConfig
from dsmip.errors import UserError
from ray_jobs.cli import app
from ray_jobs.jobs.demo import covered, run_demo
from tests.support.cluster.serving import served

WORLD = DemoConfig(seed=3, num_entities=100, num_train=96, num_validation=24, num_test=40)
SHORT = ["pretrain.epochs=1", "tune.trials=2", "tune.rungs=[1,2]", "tune.train.epochs=2"]
SHORT += [f"parts.{part}.train.epochs=1" for part in ("text", "visual", "multimodal")]


def test_how_far_the_gate_goes_from_the_best_expert_to_the_oracle() -> None:
    hits = {"text": 0.2, "visual": 0.4, "dsmip": 0.5, "oracle": 0.8}
    models = {name: {"hits@1": value} for name, value in hits.items()}
    assert covered(models, "dsmip") == pytest.approx(0.25)
    assert covered(models | {"oracle": {"hits@1": 0.4}}, "dsmip") is None


def test_a_folder_belongs_to_one_demo(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"world": DemoConfig(seed=8).model_dump(), "seconds": {}}))
    with pytest.raises(UserError, match="holds the demo of seed 8"):
        run_demo(tmp_path, WORLD)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_compares_experts_gate_and_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    results = run_demo(out, WORLD, overrides=SHORT)
    seen = capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["models"]) == ["text", "visual", "multimodal", "dsmip", "oracle"]
    assert all(set(f) == {"hits@1", "hits@3", "hits@5", "mrr", "mean_rank"} for f in results["models"].values())
    assert list(results["fusions"]) == ["mean", "product"]
    assert all(set(f) == {"hits@1", "hits@3", "hits@5", "mrr", "mean_rank"} for f in results["fusions"].values())
    report = json.loads((out / "run" / "dsmip" / "part.json").read_text())
    assert set(report["fusion"]["validation"]) == {"text", "visual", "multimodal", "mean", "product"}
    assert all(f"warning: {line[:40]}" in " ".join(seen.split()) for line in report["warnings"])
    for figure in ("hits@1", "hits@3", "hits@5", "mrr"):
        found = {name: f[figure] for name, f in results["models"].items() if name != "dsmip"}  # a mixture may be better
        assert max(found.values()) == found["oracle"]
    for shares in results["gate"].values():
        assert list(shares) == ["text", "visual", "multimodal"]
        assert sum(shares.values()) == pytest.approx(1)
    assert set(results["kinds"]) == {"easy", "text", "missing_picture", "picture", "pointing", "both"}
    assert list(results["seconds"]) == ["release", "prepare", "pretrain", "train", "tune", "evaluate"]
    said = seen
    assert "of the way from the best expert to the oracle" in said or results["models"]["oracle"]["hits@1"] == 0
    assert "dsmip train --config demo --data my-data --run my-run --set backbone.pretrained=" in said

    serve, command = (line.strip() for line in said.rstrip().splitlines()[-2:])
    assert serve == f"dsmip serve {out / 'run'}"
    with served(shlex.split(serve)[1:]) as (address, _):
        assert httpx.get(f"{address}/health/ready").json()["calibrated"] is True
        answer = httpx.post(f"{address}/link", json={"word": "x", "explain": True}, timeout=60)  # as the page asks
        links = answer.json()["mentions"][0]["links"]
        assert [[part["name"] for part in link["parts"]] for link in links] == [["text", "visual", "multimodal"]] * 5
    assert command.startswith(f"dsmip link {out / 'run'} --word ")
    linked = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert linked.exit_code == 0
    assert "entity" in linked.output
    assert len(linked.output.splitlines()) >= 6  # a title and the best five

    again = run_demo(out, WORLD, overrides=SHORT)
    assert {**again, "seconds": None} == {**results, "seconds": None}
    said = capsys.readouterr().out
    assert "backbone.safetensors is finished already" in said
    assert said.count("finished already, validation") == 3
    assert "sweep finished already" in said
