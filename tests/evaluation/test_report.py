"""Evaluations on disk: metrics.json, ranks.parquet and the oracle over several models."""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.evaluation.experts.oracle import oracle
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.metrics import METRICS, Metric
from dsmip.evaluation.report import Evaluated, evaluate_model
from dsmip.evaluation.stored.comparison import compare, read_evaluation
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.ops.ranking import hits_at
from dsmip.runs.load_config import parse_config
from dsmip.runs.loaded_model import model_names
from dsmip.runs.run import Run
from ray_jobs.cli import app

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(run: Run) -> Evaluated:
    return evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU)


def rows(evaluated: Evaluated) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = pq.read_table(evaluated.folder / "ranks.parquet").to_pylist()
    return records


@pytest.mark.parametrize("model", ["dsmip", "visual"])
def test_metrics_are_those_of_the_ranks(run: Run, model: str) -> None:
    evaluated = evaluate_model(OpenedEvaluation(run, "test", model), CPU)
    assert evaluated.folder == run.folder / "evaluate" / "test" / model
    metrics = json.loads((evaluated.folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(evaluated.metrics))
    assert (metrics["model"], metrics["split"], metrics["mentions"], metrics["entities"]) == (model, "test", 8, 11)
    records = rows(evaluated)

    def check(found: dict[str, float], chosen: list[dict[str, Any]]) -> None:
        ranks = [record["rank"] for record in chosen]
        assert found["hits@1"] == pytest.approx(sum(rank <= 1 for rank in ranks) / len(ranks))
        assert found["hits@10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / len(ranks))
        assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
        assert found["mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
        pessimistic = [1 + record["better"] + record["tied"] for record in chosen]
        assert found["mean_rank_pessimistic"] == pytest.approx(sum(pessimistic) / len(pessimistic))

    check(metrics["overall"], records)
    assert [found["mentions"] for found in metrics["groups"]["kind"].values()] == [4, 4]
    assert metrics["groups"].keys() == {"kind", "gold_seen", "picture", "ambiguity"}
    for group, values in metrics["groups"].items():
        assert set(values) == {record[group] for record in records}
        for value, found in values.items():
            chosen = [record for record in records if record[group] == value]
            assert found["mentions"] == len(chosen)
            check(found, chosen)


def test_every_overall_figure_has_its_interval(whole: Evaluated) -> None:
    overall, confidence = whole.metrics["overall"], whole.metrics["confidence"]
    assert confidence.keys() == overall.keys()
    for name, (low, high) in confidence.items():
        assert low <= overall[name] <= high
    assert confidence["mrr"][0] < confidence["mrr"][1]


def test_an_evaluation_says_how_it_was_made(run: Run, whole: Evaluated) -> None:
    protocol = whole.metrics["protocol"]
    mentions, ids = list(run.dataset.mentions("test")), [entity.entity_id for entity in run.dataset.entities()]
    assert (protocol["entities"], protocol["mentions"], protocol["split"]) == (len(ids), len(mentions), "test")
    assert protocol["entities_sha256"] == hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    golds = sorted(f"{mention.mention_id}\t{mention.entity_id}" for mention in mentions)
    assert protocol["mentions_sha256"] == hashlib.sha256("\n".join(golds).encode()).hexdigest()
    texts = [[each.entity_id, each.name, each.attributes] for each in run.dataset.entities()]
    texts += [[each.mention_id, each.word, each.sentence] for each in mentions]
    lines = sorted(json.dumps(each, ensure_ascii=False) for each in texts)
    assert protocol["texts_sha256"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert protocol["fixed_batches"] is None
    assert (protocol["ranked"], protocol["ties"]) == ("all entities", "realistic")
    assert (protocol["texts"], protocol["seed"]) == (run.dataset.manifest.choices, run.config.seed)
    assert protocol["tune_seed"] is None
    assert torch.__version__.startswith(protocol["versions"]["torch"])
    stored = read_evaluation(run.folder, "test", None).protocol
    assert stored is not None
    assert stored.model_dump(mode="json") == protocol


def test_an_evaluation_says_by_which_seed_its_model_s_trials_were_drawn(run: Run, tmp_path: Path) -> None:
    own = Run.open(shutil.copytree(run.folder, tmp_path / "run"))
    ranked = list(own.dataset.mentions("test")), [entity.entity_id for entity in own.dataset.entities()]

    def seeds(report: dict[str, Any], sweep: dict[str, Any] | None = None) -> list[int | None]:
        own.storage.write_json("dsmip/part.json", report)
        if sweep is not None:
            own.storage.write_json("tune/sweep.json", sweep)
        models = ("dsmip", "mean", "product", "text")
        return [EvaluationProtocol.of(own, model, "test", *ranked).tune_seed for model in models]

    assert seeds({}) == [None] * 4
    assert seeds({"sweep": "a"}) == [None] * 4
    older = {"sha256": "a", "seed": 5}
    assert seeds({"sweep": "a"}, older) == [5, 5, 5, None]
    assert seeds({"sweep": "another"}, older) == [None] * 4
    assert seeds({"sweep": "another", "tune_seed": 7}, older) == [7, 7, 7, None]
    assert seeds({"sweep": "a"}, {"sha256": "a"}) == [None] * 4


def test_figures_adjusted_for_chance(whole: Evaluated) -> None:
    overall, entities = whole.metrics["overall"], 11
    of_guessing = sum(1 / rank for rank in range(1, entities + 1)) / entities
    assert whole.metrics["adjusted"] == pytest.approx(
        {
            "mean_rank_index": 1 - (overall["mean_rank"] - 1) / ((entities + 1) / 2 - 1),
            "mrr": (overall["mrr"] - of_guessing) / (1 - of_guessing),
        }
    )


def test_two_models_of_a_run_can_be_compared(run: Run, whole: Evaluated) -> None:
    evaluate_model(OpenedEvaluation(run, "test", "text"), CPU)
    first, second = (read_evaluation(run.folder, "test", model) for model in (None, "text"))
    found = compare([first], [second], torch.Generator().manual_seed(0))
    assert found.metrics["mrr"].first == whole.metrics["overall"]["mrr"]
    assert set(found.groups["kind"]) == {"even", "odd"}
    assert found.groups["picture"].keys() == whole.metrics["groups"]["picture"].keys()


def test_ranks_name_mentions_golds_and_best_entities(run: Run, whole: Evaluated) -> None:
    mentions = list(run.dataset.mentions("test"))
    for mention, record in zip(mentions, rows(whole), strict=True):
        assert (record["mention_id"], record["gold"]) == (mention.mention_id, mention.entity_id)
        assert (record["word"], record["sentence"]) == (mention.word, mention.sentence)
        assert dict(record["groups"]) == dict(mention.groups)
        assert record["kind"] == mention.groups["kind"]
        assert record["rank"] == 1 + record["better"] + record["tied"] / 2
        assert len(record["top"]) == len(set(record["top"])) == 11
        assert record["top_scores"] == sorted(record["top_scores"], reverse=True)
        position = record["top"].index(mention.entity_id)
        assert record["better"] <= position <= record["better"] + record["tied"]
        assert record["top_experts"][position] == record["gold_expert"]


def test_shares_of_experts(run: Run, whole: Evaluated) -> None:
    """The kb is smaller than top-k: all pairs' experts stand in the ranks."""
    records, usage = rows(whole), whole.metrics["experts"]
    pairs = [expert for record in records for expert in record["top_experts"]]
    golds = [record["gold_expert"] for record in records]
    assert usage.keys() == {"pair_share", "gold_share", "by_kind", "tie_share", "best"}
    for found, names in ((usage["pair_share"], pairs), (usage["gold_share"], golds)):
        assert list(found) == ["text", "visual", "multimodal"]
        for name, share in found.items():
            assert share == pytest.approx(names.count(name) / len(names))
    assert usage["tie_share"] == 0
    odd = [record["gold_expert"] for record in records if record["kind"] == "odd"]
    assert usage["by_kind"]["odd"]["gold_share"]["text"] == pytest.approx(odd.count("text") / len(odd))
    assert "experts" not in evaluate_model(OpenedEvaluation(run, "test", "text"), CPU).metrics


def test_who_scored_the_best_entities_and_how_well(run: Run, whole: Evaluated) -> None:
    without_image = [mention.image is None for mention in run.dataset.mentions("test")]
    best = whole.metrics["experts"]["best"]
    assert sum(found["mentions"] for found in best.values()) == 8
    for name, found in best.items():
        chosen = [number for number, record in enumerate(rows(whole)) if record["top_experts"][0] == name]
        hits = [rows(whole)[number]["rank"] <= 1 for number in chosen]
        expected = {"mentions": len(chosen), "without_image": sum(without_image[number] for number in chosen)}
        assert found == expected | ({"hits@1": pytest.approx(sum(hits) / len(hits))} if hits else {})


def test_a_second_evaluation_writes_the_same(run: Run, whole: Evaluated) -> None:
    before = rows(whole)
    again = evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU)
    assert again.metrics == whole.metrics
    assert rows(again) == before


def test_an_index_of_earlier_weights_is_replaced(run: Run) -> None:
    evaluate_model(OpenedEvaluation(run, "test", "visual"), CPU)
    evaluate_model(OpenedEvaluation(run, "validation", "visual"), CPU)
    (before,) = (run.folder / "index").glob("visual-*")
    assert {path.stem for path in before.iterdir()} == {"index", "slice-000000", "test", "validation"}
    matcher = run.load_part("visual", with_encoder=True)
    with torch.no_grad():
        for parameter in matcher.scorer.parameters():
            parameter.mul_(1.1)
    run.save_part("visual", matcher, {})
    evaluate_model(OpenedEvaluation(run, "test", "visual"), CPU)
    (after,) = (run.folder / "index").glob("visual-*")
    assert after != before


def test_what_cannot_be_evaluated(
    run: Run, small_config: ExperimentConfig, small_data: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unknown split 'dev'.*validation"):
        evaluate_model(OpenedEvaluation(run, "dev", "dsmip"), CPU)
    with pytest.raises(UserError, match=r"unknown model 'gate'.*dsmip, text, visual, multimodal"):
        evaluate_model(OpenedEvaluation(run, "test", "gate"), CPU)
    fresh = Run.create(tmp_path / "fresh", small_config, small_data)
    for model, command in (("text", "train"), ("dsmip", "tune")):
        with pytest.raises(UserError, match=rf"no finished '{model}'; run 'dsmip {command}'"):
            evaluate_model(OpenedEvaluation(fresh, "test", model), CPU)


def test_a_damaged_split_is_refused_before_anything_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run.folder / "index", ignore_errors=True)
    first, *others = run.dataset.mentions("test")
    outside = replace(first, entity_row=run.dataset.num_entities)
    for mentions, message in (
        ([], "split 'test' of .* has no mentions"),
        ([*others, outside], f"the gold of mention {first.mention_id} in 'test' is row 11 of the kb, which has 11"),
    ):
        monkeypatch.setattr(Dataset, "mentions", lambda dataset, split, found=mentions: iter(found))
        with pytest.raises(UserError, match=message):
            evaluate_model(OpenedEvaluation(run, "test", "text"), CPU)
    assert not (run.folder / "index").exists()


def test_models_of_a_run_the_whole_first(run: Run) -> None:
    mimic = parse_config({"model": "mimic", "backbone": {"architecture": "tiny"}})
    assert model_names(run.config) == ("dsmip", "text", "visual", "multimodal")
    assert model_names(mimic) == ("mimic",)


def ranks_file(folder: Path, ranks: list[float], ids: str = "abcd", kinds: list[str | None] | None = None) -> Path:
    folder.mkdir()
    better = [int(rank) - 1 for rank in ranks]
    tied = [round(2 * (rank - 1 - fewer)) for rank, fewer in zip(ranks, better, strict=True)]
    columns = {"mention_id": list(ids), "rank": ranks, "better": better, "tied": tied}
    table = pa.table({**columns, "kind": kinds or ["x", "x", "y", None]})
    pq.write_table(table, folder / "ranks.parquet")
    return folder


def test_the_oracle_takes_the_best_rank_of_each_mention(tmp_path: Path) -> None:
    folders = {
        "text": ranks_file(tmp_path / "text", [1.0, 4.0, 2.5, 10.0]),
        "visual": ranks_file(tmp_path / "visual", [2.0, 2.0, 3.0, 1.0]),
    }
    found = oracle(folders)
    assert found["overall"]["hits@1"] == 0.5
    assert found["overall"]["hits@3"] == 1.0
    assert found["overall"]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2.5 + 1) / 4)
    assert found["overall"]["mean_rank"] == pytest.approx((1 + 2 + 2.5 + 1) / 4)
    assert found["by_kind"] == {"x": 0.5, "y": 0.0}


def test_the_oracle_needs_the_same_mentions(tmp_path: Path) -> None:
    folders = {"a": ranks_file(tmp_path / "a", [1.0] * 4), "b": ranks_file(tmp_path / "b", [1.0] * 4, ids="abdc")}
    with pytest.raises(UserError, match="different mentions"):
        oracle(folders)


def test_a_metric_is_one_entry_of_the_table(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reports with their groups and intervals, comparisons, the oracle and displays have it then."""
    monkeypatch.setitem(METRICS, "hits@2", Metric(partial(hits_at, k=2), is_bounded=True, shown_of_candidates=True))
    evaluated = {name: evaluate_model(OpenedEvaluation(run, "test", name), CPU) for name in ("text", "visual")}
    report = json.loads((evaluated["text"].folder / "metrics.json").read_text())
    of_kind = report["groups"]["kind"]["odd"]
    for figures in (report["overall"], report["confidence"], of_kind, of_kind["confidence"]):
        assert "hits@2" in figures
    folders = {name: each.folder for name, each in evaluated.items()}
    assert oracle(folders)["overall"]["hits@2"] >= report["overall"]["hits@2"]
    first, second = (read_evaluation(run.folder, "test", name) for name in evaluated)
    assert (
        compare([first], [second], torch.Generator().manual_seed(0)).metrics["hits@2"].first
        == report["overall"]["hits@2"]
    )
    command = ["evaluate", "--run", str(run.folder), "--model", "text", "--candidates", "3"]
    result = CliRunner().invoke(app, command)
    assert result.output.count("hits@2 ") == 2, result.output
