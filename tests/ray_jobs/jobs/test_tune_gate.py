"""Stage two on a real Ray: the same sweep twice gives the same winner, an interrupted one too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmip.config import ExperimentConfig, TuneConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.report import evaluate_model
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.runs.status import read_status
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import CPU, train_part
from ray_jobs.jobs import tune_gate as job
from ray_jobs.jobs.tune_gate import tune_gate
from ray_jobs.terminal.display import Display
from ray_jobs.training.sweep import run_rung

pytestmark = [pytest.mark.usefixtures("ray_cluster")]
SPACE = {
    "system.gate.temperature": {"values": [0.1, 0.5, 1.0]},
    "train.learning_rate": {"loguniform": [1e-3, 1e-2]},
    "system.use": {"values": [["text", "multimodal"], ["text", "visual", "multimodal"]]},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_config: ExperimentConfig, small_data: Dataset) -> Path:
    """A run whose experts are finished."""
    tune = TuneConfig(trials=3, rungs=(1, 3), reduction=2, resources={"cpu": 1}, space=SPACE, train={"epochs": 3})
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = Run.create(folder, small_config.model_copy(update={"tune": tune, "watch": ("tensorboard",)}), small_data)
    for part in run.part_names:
        train_part(run, part, LocalContext(tmp_path_factory.mktemp(part)))
    return folder


def opened(trained: Path, folder: Path) -> Run:
    shutil.copytree(trained, folder)
    return Run.open(folder)


def rungs(run: Run) -> list[dict[str, Any]]:
    return [json.loads((run.folder / "tune" / f"rung-{rung}.json").read_text()) for rung in range(2)]


@pytest.mark.slow
def test_the_winner_and_all_figures_are_the_same_again_and_after_an_interruption(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(trained, tmp_path / "first"), opened(trained, tmp_path / "second")
    report = tune_gate(first, first.config, Display(), seed=4)
    found = rungs(first)
    assert [len(rung["mrr"]) for rung in found] == [3, 2]
    assert report["trial"] in found[0]["survivors"]
    assert report["best"]["mrr"] == max(found[1]["mrr"].values())

    class Interrupted(Exception):
        pass

    def stop_after_the_first(run: Run, rung: int, *arguments: Any) -> Any:
        if rung == 1:
            raise Interrupted
        return run_rung(run, rung, *arguments)

    monkeypatch.setattr(job, "run_rung", stop_after_the_first)
    with pytest.raises(Interrupted):
        tune_gate(second, second.config, Display(), seed=4)
    monkeypatch.setattr(job, "run_rung", run_rung)
    assert not second.is_finished("dsmip")
    assert tune_gate(second, second.config, Display(), seed=4) == report
    assert rungs(second) == found

    assert {path.name for path in (first.folder / "tensorboard").iterdir()} == {"trial-0", "trial-1", "trial-2"}
    records = [json.loads(path.read_text()) for path in sorted((second.folder / "records").iterdir())]
    assert [record["outcome"].split(":")[0] for record in records] == ["failed", "finished"]

    status = read_status(first.folder)
    assert {each.state for each in status.parts} == {"finished"}
    assert sorted(each.state for each in status.trials) == ["dropped", "finished", "finished"]
    assert (status.problems, status.next.split()[:2]) == ([], ["dsmip", "evaluate"])

    figures = [evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU).metrics for run in (first, second)]
    assert figures[0] == figures[1]
    assert figures[0]["protocol"]["tune_seed"] == 4
    assert tune_gate(first, first.config, Display(), seed=4) == report  # finished: nothing runs
    with pytest.raises(UserError, match="holds another sweep"):
        tune_gate(first, first.config, Display(), seed=5)


@pytest.mark.soak
def test_experts_of_other_settings_are_trained_first(trained: Path, tmp_path: Path) -> None:
    run = opened(trained, tmp_path / "run")
    greedy = changed(run.config, {"tune": {"resources": {"cpu": 99}}})
    run = Run.create(run.folder, greedy, run.dataset)  # what the sweep itself asks counts
    space = {"system.experts.multimodal.prompt_length": {"values": [1]}}
    config = run.config.model_copy(update={"tune": TuneConfig(trials=2, rungs=(1,), space=space)})
    report = tune_gate(run, config, Display())
    variants = list((run.folder / "variants").glob("*/multimodal/part.json"))
    assert len(variants) == 1
    assert set(rungs_of(run)) == {"0", "1"}
    assert report["trial"] in (0, 1)
    assert run.whole_config().system.experts["multimodal"].prompt_length == (2 if report["trial"] == 0 else 1)  # type: ignore[attr-defined]


def rungs_of(run: Run) -> dict[str, float]:
    stored: dict[str, float] = json.loads((run.folder / "tune" / "rung-0.json").read_text())["mrr"]
    return stored


def test_what_cannot_be_tuned_is_said_before_anything_runs(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    short = small_config.model_copy(update={"tune": TuneConfig(rungs=(1,))})
    run = Run.create(tmp_path / "run", short, small_data)
    with pytest.raises(UserError, match="run 'dsmip train' first"):
        tune_gate(run, run.config, Display())
    wide = small_config.model_copy(update={"tune": TuneConfig(rungs=(1,), resources={"cpu": 99})})
    with pytest.raises(UserError, match="a trial asks 1 worker with 99 CPU"):
        tune_gate(Run.create(tmp_path / "other", wide, small_data), wide, Display())
