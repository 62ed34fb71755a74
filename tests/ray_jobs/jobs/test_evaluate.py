"""Evaluation on a real Ray: slices of the kb on workers give what one process gives, also when a worker is lost."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_prep.build.view import make_view
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation, RankingFiles, plan_files
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import Ranking
from dsmip.evaluation.report import evaluate_model
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.runs.load_config import changed, to_yaml
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file
from ray_jobs.cli import app
from ray_jobs.jobs.ranking_workers import RayWorkers
from ray_jobs.terminal.display import Display

pytestmark = [pytest.mark.usefixtures("ray_cluster")]
CPU = torch.device("cpu")


@pytest.fixture
def files(run: Run) -> RankingFiles:
    return built(plan_files(OpenedEvaluation(run, "test", "dsmip")))


def built(files: RankingFiles) -> RankingFiles:
    files.build(list(files.missing), CPU)
    files.finish()
    return files


def workers(num_workers: int, gpu: bool = False, options: RankOptions = RankOptions()) -> RayWorkers:
    return RayWorkers(num_workers, gpu, options, Display())


def assert_equal(found: Ranking, expected: Ranking) -> None:
    for name in ("top_row_Mk", "top_score_Mk"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("gold_M", "top_Mk", "pairs_MB", "tied_M"):
        assert torch.equal(getattr(found.choices, name), getattr(expected.choices, name)), name
    assert found.cost.token_pairs_M2 is not None
    assert expected.cost.token_pairs_M2 is not None
    assert torch.equal(found.cost.token_pairs_M2, expected.cost.token_pairs_M2)
    assert torch.equal(found.counts.better_M, expected.counts.better_M)
    assert torch.equal(found.counts.tied_M, expected.counts.tied_M)


def subclassed(kind: type[RankingFiles], files: RankingFiles) -> RankingFiles:
    return kind(**{each.name: getattr(files, each.name) for each in fields(RankingFiles)})


class LosesABuilder(RankingFiles):
    """The process that builds the first of its files before any other does is killed then, with more to build."""

    def build(
        self,
        names: Sequence[str],
        device: torch.device,
        progress: Progress = no_progress,
        evaluation: OpenedEvaluation | None = None,
    ) -> None:
        super().build(names[:1], device, progress)
        killed, path = Path(self.run) / "killed-builder", self.index / names[0]
        try:
            with killed.open("x") as note:
                note.write(f"{path}\n{path.stat().st_mtime_ns}")
        except FileExistsError:
            super().build(names, device, progress)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def hashes(files: RankingFiles) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in files.index.iterdir()}


@pytest.mark.slow
def test_builders_make_what_one_process_makes(run: Run) -> None:
    files = built(plan_files(OpenedEvaluation(run, "test", "multimodal"), slice_rows=3))
    expected = hashes(files)
    assert len(expected) == 4 + 2
    shutil.rmtree(files.index)
    lossy = subclassed(LosesABuilder, files)
    workers(2).build(lossy)
    assert not lossy.missing
    lossy.finish()
    assert hashes(lossy) == expected
    path, made = (run.folder / "killed-builder").read_text().splitlines()
    assert Path(path).stat().st_mtime_ns == int(made)  # what the lost worker had finished was kept
    workers(2, gpu=True).build(lossy)  # nothing is missing: no worker, no GPU is asked for


class Damaged(RankingFiles):
    def build(
        self,
        names: Sequence[str],
        device: torch.device,
        progress: Progress = no_progress,
        evaluation: OpenedEvaluation | None = None,
    ) -> None:
        raise UserError(f"no room for {names[0]}")


@pytest.mark.slow
def test_a_users_mistake_comes_from_a_builder_as_it_is(run: Run) -> None:
    damaged = subclassed(Damaged, plan_files(OpenedEvaluation(run, "test", "multimodal"), slice_rows=6))
    with pytest.raises(UserError, match=r"^no room for (test|slice-00000[01])\.safetensors$"):
        workers(2).build(damaged)


def test_this_process_needs_no_gpu_of_its_own(run: Run) -> None:
    """It is the cluster that is asked for GPUs; a numbered one cannot be had there."""
    command = ["evaluate", "--run", str(run.folder), "--model", "text", "--workers", "2", "--device"]
    for device, message in (
        ("cuda", "2 workers with 1 CPU and 1 GPU each, which this cluster can never give"),
        ("cuda:0", "Ray gives each worker its device; say cuda"),
    ):
        assert message in str(CliRunner().invoke(app, [*command, device]).exception)


class LosesAWorker(RankingFiles):
    """The first process that opens it is killed."""

    def open(self, evaluation: OpenedEvaluation | None = None) -> RankedModel:
        killed = Path(self.run) / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open()


def test_workers_rank_as_one_process(files: RankingFiles) -> None:
    options = RankOptions(top_k=2)
    alone = files.open().rank(CPU, options)
    assert_equal(workers(3, options=options).rank(subclassed(LosesAWorker, files)), alone)
    assert alone.cost.refinement is not None
    assert alone.cost.refinement.num_pairs < 8 * 11  # else single precision had no part in it
    assert (Path(files.run) / "killed").exists()


@pytest.mark.slow
def test_workers_survey_and_rank_fused_experts_as_one_process(run: Run) -> None:
    """The gate sees how sure the experts are over the whole kb, which no worker has."""
    config = changed(run.config, {"system": {"gate": {"preset": "confidence", "width": 8}}})
    fused = Run(run.storage / "fused", config, run.dataset)
    shutil.copytree(run.folder, fused.folder, ignore=shutil.ignore_patterns("fused", "index", "evaluate"))
    fused.storage.write_text("config.yaml", to_yaml(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        fused.save_part("dsmip", fused.system.build_whole(config), {})
    opened = OpenedEvaluation(fused, "test", "dsmip")
    metrics = [evaluate_model(opened, CPU, workers=each).metrics for each in (None, workers(3, options=RankOptions()))]
    for each in metrics:
        del each["refinement"]  # its band is measured on a slice
    assert metrics[0] == metrics[1]
    assert metrics[0]["first_pass_pairs"] == 3 * 8 * 11


@pytest.mark.slow
def test_the_command_writes_the_same_with_workers(run: Run) -> None:
    """From nothing: neither index nor features are there before either of them."""
    written = []
    for workers in ("1", "2"):
        for folder in ("index", "features"):
            shutil.rmtree(run.folder / folder, ignore_errors=True)
        result = CliRunner().invoke(
            app, ["evaluate", "--run", str(run.folder), "--model", "multimodal", "--workers", workers, "-v"]
        )
        assert result.exit_code == 0, result.output
        assert "scored again in float64" in result.output
        assert ("missing files of the index on 2 workers" in result.output) == (workers == "2")
        (index,) = (run.folder / "index").iterdir()
        ranks = run.folder / "evaluate" / "test" / "multimodal" / "ranks.parquet"
        written.append([sha256_file(path) for path in (*sorted(index.iterdir()), ranks)])
    assert written[0] == written[1]
    records = [json.loads(path.read_text()) for path in sorted((run.folder / "records").iterdir())][-2:]
    assert [(record["command"], record["outcome"]) for record in records] == [("evaluate", "finished")] * 2


@pytest.mark.slow
def test_workers_rank_other_data_as_one_process(run: Run, tmp_path: Path) -> None:
    """A view of the data is other data."""
    make_view(run.dataset.folder, tmp_path / "view", 0.5, 0)
    command = ["evaluate", "--run", str(run.folder), "--model", "text", "--data", str(tmp_path / "view")]
    written = []
    for workers in ("1", "2"):
        shutil.rmtree(run.folder / "other_data", ignore_errors=True)
        result = CliRunner().invoke(app, [*command, "--workers", workers])
        assert result.exit_code == 0, result.output
        assert "on which the run was not made: its figures go into" in result.output
        (folder,) = (run.folder / "other_data").iterdir()
        assert f"{folder}/evaluate/test/text/metrics.json" in result.output.replace("\n", "")
        written.append(sha256_file(folder / "evaluate/test/text/ranks.parquet"))
    assert written[0] == written[1]


@pytest.mark.slow
def test_nan_of_a_worker_is_told_with_names(run: Run) -> None:
    matcher = run.load_part("visual", with_encoder=True)
    with torch.no_grad():
        next(matcher.parameters()).fill_(float("nan"))
    run.save_part("visual", matcher, {})
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run.folder), "--model", "visual", "--workers", "2"])
    mention_id = next(iter(run.dataset.mentions("test"))).mention_id
    assert f"visual of {run.folder} scores mention {mention_id} and entity" in str(result.exception)
