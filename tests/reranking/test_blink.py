"""BLINK from end to end: the bi-encoder, the cross-encoder over its best entities, and both stages' figures."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip import distributed
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.report import evaluate_model
from dsmip.evaluation.stored.layout import RANKS, UNKNOWN
from dsmip.models.cross_encoders.blink import BI_ENCODER, CROSS_ENCODER, Blink, one_text
from dsmip.reranking.candidates import score_candidates
from dsmip.reranking.second_stage import second_stage
from dsmip.reranking.training import train_any_part
from dsmip.runs.load_config import changed, load_config, parse_config
from dsmip.runs.loaded_model import model_names
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import CPU
from tests.support.small_release import write_colours
from tests.support.training.workers import run_workers

SYSTEM: dict[str, Any] = {"pooling": "tower", "markers": [], "candidates": 4, "num_tokens": 20}


def blink(narrow_backbone: Path, **train: Any) -> ExperimentConfig:
    template = {"mention": "{left} | {word} | {right}", "entity": "{name} : {attributes}"}
    tree = {
        "model": "blink",
        "backbone": {"architecture": str(narrow_backbone)},
        "system": {**SYSTEM, "template": template},
        "train": {"epochs": 12, "batch_size": 8, "learning_rate": 3e-3, **train},
        "parts": {BI_ENCODER: {"train": {"epochs": 2}}},
    }
    return parse_config(tree)


@pytest.fixture(scope="module")
def trained(small_data: Dataset, narrow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("blink")
    run = Run.create(folder / "run", blink(narrow_backbone), small_data)
    for part in run.part_names:
        train_any_part(run, part, LocalContext(folder / part))
    return run


def test_the_second_stage_learns_what_the_first_has_not(trained: Run) -> None:
    """Among four candidates the gold is one in four by chance."""
    first, second = (trained.part_report(part) for part in (BI_ENCODER, CROSS_ENCODER))
    assert second["best"]["hits@1"] > first["best"]["hits@1"]
    assert second["history"][-1]["loss"] < 0.7 * second["history"][0]["loss"]


def test_ranks_are_over_the_whole_kb_and_the_first_stage_is_beside(trained: Run) -> None:
    found = dsmip.evaluate(trained.folder, "test")
    assert found.metrics["model"] == "blink"
    first = found.metrics["first_stage"]
    assert (first["model"], first["candidates"]) == (BI_ENCODER, 4)
    alone = dsmip.evaluate(trained.folder, "test", BI_ENCODER).metrics["overall"]
    assert {name: first[name] for name in alone} == alone
    assert 0 <= first["gold_recall"] <= 1
    # a gold outside the candidates keeps its rank, which is behind all of them
    before = pq.read_table(trained.folder / "evaluate" / "test" / BI_ENCODER / RANKS)
    after = pq.read_table(found.folder / RANKS)
    ranks = zip(before.column("rank").to_pylist(), after.column("rank").to_pylist(), strict=True)
    outside = [(old, new) for old, new in ranks if old > 4.5]
    assert outside
    assert all(old == new for old, new in outside)
    assert found.metrics["overall"]["hits@1"] <= first["gold_recall"]


def test_mentions_of_the_unknown_are_re_ranked_too(trained: Run, tmp_path: Path) -> None:
    """What is stored of them is what a linker says."""
    answers = [*(f"Q{number}" for number in range(6)), "nil", "nil"]
    release = MimicRelease(write_colours(tmp_path / "release", answers))
    prepare(release, tmp_path / "data", DatasetOptions(name="colours", keep_nil=True))
    run = Run.create(tmp_path / "run", trained.config, Dataset.open(tmp_path / "data"))
    for part in run.part_names:
        shutil.copytree(trained.folder / part, run.folder / part)
    evaluation = OpenedEvaluation(run, "test")
    found = evaluate_model(evaluation, CPU, second_stage=second_stage(evaluation, CPU))
    assert (found.metrics["mentions"], found.metrics["unknown"]) == (6, 2)
    rows = pq.read_table(found.folder / UNKNOWN).to_pylist()
    linker = dsmip.load(run.folder)
    for row in rows:
        links = linker.link(row["word"], sentence=row["sentence"], top=6)
        assert [link.entity_id for link in links] == row["top"]
        assert [link.score for link in links] == pytest.approx(row["top_scores"], abs=1e-5)


def test_the_whole_comes_first_and_a_re_ranker_is_no_model(trained: Run) -> None:
    assert model_names(trained.config) == ("blink", BI_ENCODER)
    with pytest.raises(UserError, match="unknown model 'crossencoder'; this run has blink, biencoder"):
        trained.load_model(CROSS_ENCODER)


def test_candidates_of_a_re_ranked_model_are_its_first_stages(trained: Run) -> None:
    evaluation = OpenedEvaluation(trained, "test")
    stage = second_stage(evaluation, CPU)
    with pytest.raises(UserError, match=r"blink re-ranks 4 of its first stage's best already; .* --model biencoder"):
        evaluate_model(evaluation, CPU, second_stage=stage, candidates=3)


def test_a_re_ranked_model_is_not_evaluated_without_its_second_stage(trained: Run) -> None:
    with pytest.raises(ValueError, match="blink re-ranks: its second stage is needed"):
        evaluate_model(OpenedEvaluation(trained, "test"), CPU)


def test_a_re_ranker_that_has_diverged_is_one_line(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    reranker = run.load_reranker(CROSS_ENCODER)
    torch.nn.init.constant_(reranker.get_parameter("out.bias"), torch.nan)
    run.save_part(CROSS_ENCODER, reranker, run.part_report(CROSS_ENCODER))
    with pytest.raises(UserError, match=r"blink of .* scores mention m\d+ and entity Q\d+ as NaN or .* \(re-ranker\)"):
        dsmip.evaluate(tmp_path / "run", "validation")
    assert not (tmp_path / "run" / "evaluate" / "validation").exists()


def test_a_re_ranker_without_a_first_stage_is_refused(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", blink(narrow_backbone), small_data)
    with pytest.raises(UserError, match="has no finished 'biencoder'; run 'dsmip train' first"):
        train_any_part(run, CROSS_ENCODER, LocalContext(tmp_path / "work"))


@torch.no_grad()
def test_a_pairs_score_depends_on_the_pair_alone(trained: Run) -> None:
    reranker, collator = trained.load_reranker(CROSS_ENCODER).eval(), trained.collator(CROSS_ENCODER)
    rows = torch.tensor([[0, 3, 5], [7, -1, -1], *[[1, 2, 4]] * 6])
    found = score_candidates(reranker, trained.dataset, "test", collator, rows, CPU)
    mentions = collator.mentions(list(trained.dataset.mentions("test")))
    for mention, column in (rows >= 0).nonzero().tolist():
        entity = collator.entities([trained.dataset.entity(int(rows[mention, column]))])
        own = mentions.rows(mention, mention + 1)
        alone = reranker.score_pairs(own, entity, torch.tensor([0]), torch.tensor([0]))
        torch.testing.assert_close(found[mention, column], alone[0], atol=1e-5, rtol=1e-5)
    assert found[1, 1:].tolist() == [-torch.inf, -torch.inf]


def test_two_texts_are_one_without_a_gap() -> None:
    first, second = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]]), torch.tensor([[1, 8, 9, 2], [1, 2, 0, 0]])
    ids, mask = one_text(first, first > 0, second, second > 0)
    assert ids.tolist() == [[1, 5, 2, 8, 9, 2], [1, 6, 7, 2, 2, 0]]
    assert mask.tolist() == [[True] * 6, [True] * 5 + [False]]


def train_again(folder: Path, run: Path, data: Path, micro_batch_size: int | None) -> list[float]:
    """Loss and validation MRR of one epoch, by one of several workers."""
    config = changed(
        load_config(str(run / "config.yaml")), {"train": {"epochs": 1, "micro_batch_size": micro_batch_size}}
    )
    context = LocalContext(folder / str(distributed.rank()))
    result = train_any_part(Run(run, config, Dataset.open(data)), CROSS_ENCODER, context)
    return [result.history[0]["loss"], result.best["mrr"]]


def test_what_the_first_stage_found_is_kept(trained: Run, tmp_path: Path) -> None:
    """A training that goes on, or begins anew, reads it: without a negative there is nothing to lose."""
    shutil.copytree(trained.folder, tmp_path / "run")
    where = tmp_path / "run", trained.dataset.folder
    (kept,) = (tmp_path / "run" / "features").glob("biencoder-candidates-*.safetensors")
    stored = load_file(kept)
    save_file({**stored, "hard": torch.full_like(stored["hard"], -1)}, kept)
    assert train_again(tmp_path / "read", *where, None)[0] == 0.0
    kept.write_bytes(b"damaged")
    assert train_again(tmp_path / "anew", *where, None)[0] > 0.1
    assert torch.equal(load_file(kept)["hard"], stored["hard"])


@pytest.mark.slow
def test_micro_batches_and_workers_train_as_one_whole_batch(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    where = tmp_path / "run", trained.dataset.folder
    whole = train_again(tmp_path / "whole", *where, None)
    assert train_again(tmp_path / "few", *where, 3) == pytest.approx(whole, rel=1e-4)
    workers = run_workers(train_again, 2, tmp_path / "workers", tmp_path / "together", *where, None)
    assert workers[0] == workers[1] == pytest.approx(whole, rel=1e-4)


def test_texts_that_do_not_fit_beside_one_another_are_refused(narrow_backbone: Path) -> None:
    config = parse_config(
        {"model": "blink", "backbone": {"architecture": str(narrow_backbone)}, "system": {**SYSTEM, "num_tokens": 60}}
    )
    with pytest.raises(UserError, match=r"of 60 tokens each exceed the 77 positions of .* set system.num_tokens to 39"):
        Blink.check(config, Backbone.build(str(narrow_backbone), None, device="meta"))


@pytest.mark.parametrize("data", ["wikimel", "richpediamel", "wikidiverse"])
def test_shipped_configurations(data: str) -> None:
    config = load_config(f"blink_{data}")
    assert config.system.candidates == 64
    assert set(config.parts) == {BI_ENCODER, CROSS_ENCODER}
