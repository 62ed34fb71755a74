"""Evaluation on a real Ray: slices of the kb on workers give what one process gives, also when a worker is lost."""

import os
import signal
import sys

import pytest
import torch
from ray import cloudpickle
from typer.testing import CliRunner

from dsmip.evaluation import Ranking
from dsmip.rank_options import RankOptions
from dsmip.ranked_model import RankedFiles, RankedModel, store_ranked
from dsmip.reports import evaluate_model
from dsmip.runs import Run
from ray_jobs.cli import app
from ray_jobs.progress import Display
from ray_jobs.rank_slices import rank_on_ray

pytestmark = [pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests on their path
CPU = torch.device("cpu")


@pytest.fixture
def stored(run: Run) -> RankedFiles:
    return store_ranked(run, "test", "dsmip", CPU)


def assert_equal(found: Ranking, expected: Ranking) -> None:
    of_choices = ("chosen_gold_M", "chosen_top_Mk", "chosen_pairs_MB", "tied_choices_M", "token_pairs_M2")
    for name in ("top_row_Mk", "top_score_Mk", *of_choices):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.counts.better_M, expected.counts.better_M)
    assert torch.equal(found.counts.tied_M, expected.counts.tied_M)


class LosesAWorker(RankedFiles):
    """The first process that opens it is killed."""

    def open(self) -> RankedModel:
        killed = self.run / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open()


def test_workers_rank_as_one_process(stored: RankedFiles) -> None:
    lossy = LosesAWorker(stored.run, stored.split, stored.model, stored.index, stored.made_from)
    options = RankOptions(top_k=2)
    alone = stored.open().rank(CPU, options)
    assert_equal(rank_on_ray(lossy, 3, gpu=False, options=options, display=Display()), alone)
    assert alone.refinement is not None
    assert alone.refinement.num_pairs < 8 * 11  # else single precision had no part in it
    assert (stored.run / "killed").exists()


def test_the_command_writes_the_same_with_workers(run: Run) -> None:
    alone = evaluate_model(run, "test", "text", CPU)
    before = (alone.folder / "ranks.parquet").read_bytes()
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run.folder), "--model", "text", "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert "scored again in float64" in result.output
    assert (alone.folder / "ranks.parquet").read_bytes() == before


def test_nan_of_a_worker_is_told_with_names(run: Run) -> None:
    matcher = run.load_part("visual", with_encoder=True)
    with torch.no_grad():
        next(matcher.parameters()).fill_(float("nan"))
    run.save_part("visual", matcher, {})
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run.folder), "--model", "visual", "--workers", "2"])
    mention_id = next(iter(run.dataset.mentions("test"))).mention_id
    assert f"visual of {run.folder} scores mention {mention_id} and entity" in str(result.exception)
