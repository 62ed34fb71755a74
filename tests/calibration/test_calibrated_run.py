"""A run that is calibrated by its validation mentions, and what its evaluations say then."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation, plan_files
from dsmip.evaluation.stored.calibration import stored_calibration
from dsmip.linking.load import LoadOptions, load_linker
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file
from ray_jobs.cli import app
from tests.support.small_release import write_colours

SOME_NIL = tuple("nil" if number % 4 == 3 else f"Q{number % 6}" for number in range(32))


def _made_run(config: ExperimentConfig, folder: Path, answers: tuple[str, ...], *, keep_nil: bool) -> Run:
    """A run of random weights over six entities, with as many mentions in each split as there are answers."""
    release = MimicRelease(write_colours(folder / "release", answers))
    prepare(release, folder / "data", DatasetOptions(name="small", keep_nil=keep_nil))
    run = Run.create(folder / "run", config, Dataset.open(folder / "data"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name in run.part_names:
            run.save_part(name, run.system.build_part(name, config, with_encoder=True), {})
        run.save_part("dsmip", run.system.build_whole(config), {})
    return run


@pytest.fixture(scope="module")
def calibrated(small_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With 24 mentions in each split."""
    answers = tuple(f"Q{number % 6}" for number in range(24))
    return _made_run(small_config, tmp_path_factory.mktemp("calibrated"), answers, keep_nil=False)


def dsmip(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
def test_evaluations_report_confidences_once_it_is_calibrated(calibrated: Run) -> None:
    folder = str(calibrated.folder)
    assert stored_calibration(calibrated, "dsmip") is None
    before = dsmip("evaluate", "--run", folder)
    assert before.exit_code == 0, before.output
    assert "confidence" not in before.output
    said = dsmip("calibrate", "--run", folder)
    assert said.exit_code == 0, said.output
    assert "dsmip is calibrated" in said.output
    assert "confidence (of the mentions that it was fitted on): off by" in said.output
    made = stored_calibration(calibrated, "dsmip")
    assert made is not None
    assert (made.mentions, made.experts) == (24, ("text", "visual", "multimodal"))
    after = dsmip("evaluate", "--run", folder, "--top-k", "2")
    assert "confidence: off by" in after.output
    assert "not in the knowledge base: AUROC" in after.output
    metrics = json.loads((calibrated.folder / "evaluate/test/dsmip/metrics.json").read_text())
    assert metrics["calibration"]["fitted_on_these"] is False
    assert 0 <= metrics["calibration"]["right"]["expected_calibration_error"] <= 1
    assert metrics["calibration"]["known"]["unknown_share"] == made.unknown_share == 0.2
    assert stored_calibration(calibrated, "text") is None
    assert dsmip("compare", folder, folder, "--model2", "dsmip").exit_code != 0  # both are the same one


def test_another_index_is_not_calibrated_by_it(calibrated: Run, tmp_path: Path) -> None:
    dsmip("calibrate", "--run", str(calibrated.folder), "--model", "text")
    made = stored_calibration(calibrated, "text")
    assert made is not None
    path = calibrated.folder / "evaluate/validation/text/calibration.json"
    path.write_text(made.model_copy(update={"index": "index/of-others"}).model_dump_json())
    said = dsmip("evaluate", "--run", str(calibrated.folder), "--model", "text")
    assert said.exit_code == 0, said.output
    assert "confidence" not in said.output


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}'])
def test_a_damaged_file_is_named(calibrated: Run, text: str) -> None:
    path = calibrated.folder / "evaluate/validation/visual/calibration.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError, match=r"visual/calibration.json is damaged .*; remove .*'dsmip calibrate' makes it"):
        stored_calibration(calibrated, "visual")


def test_too_few_validation_mentions_are_said(run: Run) -> None:
    said = dsmip("calibrate", "--run", str(run.folder))
    assert "7 validation mentions are too few to calibrate dsmip: 20 at least" in str(said.exception)


def test_kept_mentions_of_the_unknown_are_what_it_is_measured_on(
    small_config: ExperimentConfig, tmp_path: Path
) -> None:
    run = _made_run(small_config, tmp_path, SOME_NIL, keep_nil=True)
    said = dsmip("calibrate", "--run", str(run.folder), "--model", "text")
    assert said.exit_code == 0, said.output
    made = stored_calibration(run, "text")
    assert made is not None
    assert (made.mentions, made.unknown, made.unknown_share) == (24, 8, 0.25)
    said = dsmip("evaluate", "--run", str(run.folder), "--model", "text", "--top-k", "3")
    assert "where 25% are such, 8 here" in said.output
    folder = run.folder / "evaluate/test/text"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["mentions"], metrics["unknown"]) == (24, 8)  # ranks are of the others alone
    known = metrics["calibration"]["known"]
    assert (known["unknown_mentions"], known["unknown_share"]) == (8, 0.25)
    rows = pq.read_table(folder / "unknown.parquet").to_pylist()
    assert [row["mention_id"] for row in rows] == [f"m{number}" for number in range(67, 96, 4)]
    assert all(len(row["top"]) == len(row["top_scores"]) == 3 for row in rows)
    # What a linker says of such a mention is what was evaluated.
    linker = load_linker(run.folder, torch.device("cpu"), LoadOptions("text"))
    links = linker.link(rows[0]["word"], sentence=rows[0]["sentence"], top=3)
    assert [link.entity_id for link in links] == rows[0]["top"]
    assert [link.score for link in links] == pytest.approx(rows[0]["top_scores"])
    # Workers open them by the files' names.
    evaluation = OpenedEvaluation(run, "test", "text")
    here = evaluation.of_unknown()
    assert here is not None
    strangers = plan_files(evaluation).of(here).opened()
    assert (strangers.split, len(strangers.mentions), strangers.gold_row_M.tolist()) == ("test-unknown", 8, [0] * 8)
    page = tmp_path / "page.html"
    assert dsmip("evaluate", "--run", str(run.folder), "--model", "text").exit_code == 0
    assert dsmip("report", str(run.folder), "--model", "text", "--html", str(page)).exit_code == 0
    assert "Risk and coverage" in page.read_text()  # the curves give the stored area under risk


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_rank_mentions_of_the_unknown_as_one_process(small_config: ExperimentConfig, tmp_path: Path) -> None:
    run, written = _made_run(small_config, tmp_path, SOME_NIL, keep_nil=True), list[list[str]]()
    folder = run.folder / "evaluate/test/dsmip"
    for workers in ("1", "2"):
        shutil.rmtree(run.folder / "index", ignore_errors=True)
        said = dsmip("evaluate", "--run", str(run.folder), "--workers", workers)
        assert said.exit_code == 0, said.output
        written.append([sha256_file(folder / name) for name in ("ranks.parquet", "unknown.parquet")])
    assert written[0] == written[1]
    assert json.loads((folder / "metrics.json").read_text())["unknown"] == 8
