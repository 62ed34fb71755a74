"""`dsmip compare` on small evaluations written on the spot: figures, alignment, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dsmip.config import ExperimentConfig
from dsmip.evaluation.metrics import adjusted, summarise
from dsmip.evaluation.stored.layout import KB_HASH, PROTOCOL, evaluation_name
from dsmip.evaluation.stored.protocol import EvaluationProtocol, ids_hash
from dsmip.ops.ranking import Counts
from dsmip.runs.load_config import parse_config, to_yaml
from ray_jobs import cli

IDS = ["m1", "m2", "m3", "m4", "m5", "m6"]
GOLDS = ["Q1", "Q2", "Q3", "Q1", "Q2", "Q3"]
KINDS: list[str | None] = ["text", "text", "picture", "picture", "picture", None]
LANGUAGES = [[("language", "de")]] * 2 + [[]] * 4  # a group that the data set brings itself
FIRST, SECOND = [0, 0, 4, 30, 2, 0], [0, 1, 0, 0, 0, 0]  # better entities
KB = ["Q1", "Q2", "Q3", "Q4"]

Command = Callable[..., Any]


def evaluation(
    run: Path, config: ExperimentConfig, better: list[int], *, model: str = "dsmip", split: str = "test", **changes: Any
) -> Path:
    """A run folder with one evaluation.

    Args:
        changes: Columns of ranks.parquet, or `kb`, the entity ids; `texts`, those of a stored protocol; `protocol`,
            what else it says.
    """
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text('{"seed": 3, "made": {"dsmip": "0"}}')
    (run / "config.yaml").write_text(to_yaml(config))
    columns = {"mention_id": IDS, "gold": GOLDS, "better": better, "tied": [0] * len(better), "kind": KINDS}
    columns |= {name: ["x"] * len(better) for name in ("gold_seen", "picture", "ambiguity")}
    columns |= {"groups": pa.array(LANGUAGES, pa.map_(pa.string(), pa.string()))}
    entity_ids, texts, more = changes.pop("kb", KB), changes.pop("texts", None), changes.pop("protocol", {})
    about = {KB_HASH: ids_hash(entity_ids).encode()}
    if texts is not None:
        protocol = EvaluationProtocol(
            entities=len(entity_ids),
            entities_sha256=ids_hash(entity_ids),
            texts=texts,
            split=split,
            mentions=len(IDS),
            mentions_sha256="",
            seed=5,
            versions={},
            **more,
        )
        about[PROTOCOL] = protocol.model_dump_json().encode()
    table = pa.table({name: changes.get(name, column) for name, column in columns.items()})
    path = run / evaluation_name(split, model) / "ranks.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(about), path)
    return run


@pytest.fixture
def first(tmp_path: Path, small_config: ExperimentConfig) -> Path:
    return evaluation(tmp_path / "first", small_config, FIRST)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `dsmip compare`; returns what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dsmip", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `dsmip compare`, which must end with exit code 2 and one line; returns that line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dsmip", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        return said.err

    return run


def metrics_of(better: list[int]) -> dict[str, float]:
    return summarise(Counts(torch.tensor(better), torch.zeros(len(better), dtype=torch.int64)))


def test_figures_of_both_and_their_difference(
    compare: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    second = evaluation(tmp_path / "second", small_config, SECOND)
    written = tmp_path / "new" / "comparison.json"
    said = compare(first, second, "--json", written)
    report = json.loads(written.read_text())
    made = {"model": "dsmip", "data": None, "seed": 3, "made": {"dsmip": "0"}}
    assert report["runs"] == [{"run": str(run), **made} for run in (first, second)]
    assert (report["split"], report["seed"], report["num_mentions"]) == ("test", 0, len(IDS))
    before, after = metrics_of(FIRST), metrics_of(SECOND)
    assert report["metrics"].keys() == before.keys()
    for name, found in report["metrics"].items():
        assert (found["first"], found["second"]) == (before[name], after[name])
        assert found["difference"] == after[name] - before[name]
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
        assert name in said
    # hits@1 differs on 4 mentions, 3 won and 1 lost: 10 of 16 sign patterns go at least as far as 2
    assert report["metrics"]["hits@1"]["p_value"] == pytest.approx(10 / 16, abs=0.02)
    assert report["metrics"]["median_rank"]["p_value"] is None
    assert report["groups"]["kind"] == {
        "": {"mentions": 1, "hits@1": [1.0, 1.0], "interval": [0.0, 0.0]},
        "picture": {"mentions": 3, "hits@1": [0.0, 1.0], "interval": [1.0, 1.0]},
        "text": {"mentions": 2, "hits@1": [1.0, 0.5], "interval": [-1.0, 0.0]},
    }
    assert report["groups"]["language"] == {
        "": {"mentions": 4, "hits@1": [0.25, 1.0], "interval": [0.25, 1.0]},
        "de": {"mentions": 2, "hits@1": [1.0, 0.5], "interval": [-1.0, 0.0]},
    }
    assert list(report["groups"]) == ["ambiguity", "gold_seen", "kind", "language", "picture"]
    words = [line.replace("│", " ").split() for line in said.splitlines()]
    assert ["hits@1", "0.500", "0.833", "+0.333"] in [line[:4] for line in words]
    assert ["kind", "picture", "3", "0.000", "1.000", "+1.000", "+1.000", "to", "+1.000"] in words


def test_an_older_evaluation_s_column_of_ambiguous_words_is_read(
    first: Path, tmp_path: Path, small_config: ExperimentConfig, compare: Command
) -> None:
    path = evaluation(tmp_path / "second", small_config, SECOND) / evaluation_name("test", "dsmip") / "ranks.parquet"
    table = pq.read_table(path).drop_columns("groups")  # which it did not have either
    columns = ["word" if name == "ambiguity" else name for name in table.column_names]
    pq.write_table(table.rename_columns(columns).replace_schema_metadata(table.schema.metadata), path)
    assert "ambiguity" in compare(tmp_path / "second", first)


def test_mentions_are_matched_by_id_whatever_their_order_and_that_of_entities(
    compare: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    straight, turned = tmp_path / "straight.json", tmp_path / "turned.json"
    compare(first, evaluation(tmp_path / "second", small_config, SECOND), "--json", straight)
    columns: dict[str, Any] = {"mention_id": IDS[::-1], "gold": GOLDS[::-1], "kind": KINDS[::-1]}
    evaluation(tmp_path / "second", small_config, SECOND[::-1], kb=KB[::-1], **columns)
    compare(first, tmp_path / "second", "--json", turned)
    assert turned.read_text() == straight.read_text()


def test_mentions_with_one_id_are_matched_in_order(
    compare: Command, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    ids, golds = ["m1", "m1", "m2", "m3", "m4", "m5"], ["Q1", "Q2", "Q3", "Q1", "Q1", "Q1"]
    runs = [
        evaluation(tmp_path / name, small_config, better, mention_id=ids, gold=golds)
        for name, better in (("a", FIRST), ("b", SECOND))
    ]
    compare(*runs, "--json", tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["num_mentions"] == 6


def test_two_models_of_one_run(compare: Command, first: Path, small_config: ExperimentConfig) -> None:
    evaluation(first, small_config, SECOND, model="text")
    said = compare(first, first, "--model2", "text")
    assert f"1: {first} (dsmip)" in said
    assert f"2: {first} (text)" in said


def test_the_seed_decides_what_is_drawn(
    compare: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    evaluation(first, small_config, SECOND, model="text")
    files = [tmp_path / f"{n}.json" for n in range(3)]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        compare(first, first, "--model2", "text", "--seed", seed, "--json", file)
    contents = [file.read_text() for file in files]
    assert contents[0] == contents[1]
    p_values = [json.loads(content)["metrics"]["mrr"]["p_value"] for content in contents]
    assert p_values[1] != p_values[2]


def test_what_is_missing_is_named_with_its_command(
    refused: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    other = evaluation(tmp_path / "my run", small_config, SECOND, model="text")
    said = refused(first, other)
    assert f"has no evaluation of 'dsmip' on test; make it: dsmip evaluate --run '{other}' --split test" in said
    assert said.endswith("--model dsmip\n")
    assert f"dsmip evaluate --run {first} --split validation --model text" in refused(
        first, other, "--split", "validation", "--model1", "text"
    )
    assert "no run at nowhere" in refused(first, "nowhere")
    assert "unknown model 'sound'" in refused(first, other, "--model2", "sound")
    assert "unknown split 'dev'; there are train, validation, test" in refused(first, other, "--split", "dev")


def test_a_system_without_a_gate_has_its_part_as_default(refused: Command, first: Path, tmp_path: Path) -> None:
    mimic = parse_config({"model": "mimic", "backbone": {"architecture": "tiny"}})
    other = evaluation(tmp_path / "mimic", mimic, SECOND, model="other")
    assert "has no evaluation of 'mimic'" in refused(first, other)


def test_one_evaluation_is_not_compared_with_itself(refused: Command, first: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(first)
    for same in (first, tmp_path / "link"):
        assert "give another RUN2, or --model1 and --model2" in refused(first, same)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mention_id": [*IDS[:5], "m7"]}, "different mentions: 1 ('m6') only in .*1 ('m7') only in"),
        (
            {"mention_id": list("abcdef")},
            "different mentions: 6 ('m1', 'm2', 'm3', ...) only in .*6 ('a', 'b', 'c', ...)",
        ),
        ({"mention_id": [*IDS[:5], "m5"]}, "different mentions: 1 ('m6') only in .*1 ('m5') only in"),
        ({"gold": [*GOLDS[:5], "Q1"]}, "different golds: mention 'm6' is Q3 in .* and Q1 in"),
        ({"kb": [*KB, "Q5"]}, "ranked different knowledge bases"),
    ],
)
def test_different_tasks_are_refused(
    refused: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    second = evaluation(tmp_path / "second", small_config, SECOND, **changes)
    found = refused(first, second)
    for part in said.split(".*"):
        assert part in found
    assert "compare runs on the same data" in found


ATTRIBUTES, ABSTRACT = {"entity_text": "attr"}, {"entity_text": "abstract", "mention_desc": "lexical"}


def test_evaluations_that_were_not_made_alike_are_refused(
    refused: Command, compare: Command, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    first = evaluation(tmp_path / "first", small_config, FIRST, texts=ATTRIBUTES)
    second = evaluation(tmp_path / "second", small_config, SECOND, texts=ABSTRACT)
    differences = "entity_text (attr and abstract); mention_desc (nothing and lexical)"
    said = refused(first, second)
    assert f"were not evaluated alike: {differences}; compare runs on the same data, or take --across" in said
    said = compare(first, second, "--across", "--json", tmp_path / "found.json")
    assert "not evaluated alike: entity_text (attr and abstract)" in said
    assert json.loads((tmp_path / "found.json").read_text())["across"] == differences.split("; ")
    older = evaluation(tmp_path / "older", small_config, SECOND)
    alike = evaluation(tmp_path / "alike", small_config, SECOND, texts=ATTRIBUTES)
    assert "not evaluated alike" not in compare(first, alike)
    assert "side 1 has several runs of one seed" in compare(f"{first},{alike}", older).replace("\n", " ")
    assert "not evaluated alike" not in compare(first, older)
    for sides in ((older, f"{first},{second}"), (f"{older},{first}", second), (first, f"{older},{second}")):
        assert differences in refused(*sides)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"texts_sha256": "a"}, {"texts_sha256": "b"}, "texts_sha256 (a and b)"),
        ({"texts_sha256": "a"}, {}, None),  # an older version did not look at texts
        ({}, {"fixed_batches": "20 mentions, 6000 entities"}, None),
        ({"tune_seed": 1}, {"tune_seed": 2}, None),
    ],
)
def test_other_texts_are_told_apart_and_fixed_batches_and_seeds_are_for_the_record(
    refused: Command,
    compare: Command,
    small_config: ExperimentConfig,
    tmp_path: Path,
    one: dict[str, Any],
    other: dict[str, Any],
    said: str | None,
) -> None:
    first = evaluation(tmp_path / "first", small_config, FIRST, texts=ATTRIBUTES, protocol=one)
    second = evaluation(tmp_path / "second", small_config, SECOND, texts=ATTRIBUTES, protocol=other)
    if said is None:
        assert "not evaluated alike" not in compare(first, second)
    else:
        assert said in refused(first, second)


def test_knowledge_bases_of_two_sizes_are_compared_by_what_is_adjusted_for_chance(
    compare: Command, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    first = evaluation(tmp_path / "first", small_config, FIRST, texts=ATTRIBUTES)
    second = evaluation(tmp_path / "second", small_config, SECOND, texts=ATTRIBUTES, kb=[*KB, "Q8", "Q9"])
    said = compare(first, second, "--across", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    for number, (side, size) in enumerate((("first", len(KB)), ("second", len(KB) + 2)), start=1):
        expected = adjusted({name: found[name][side] for name in ("mrr", "mean_rank")}, size)
        figures = f"mean_rank_index {expected['mean_rank_index']:.3f}, mrr {expected['mrr']:.3f}"
        assert f"{number}, adjusted for chance among {size} entities: {figures}" in said
    assert "adjusted" not in compare(first, evaluation(tmp_path / "third", small_config, SECOND, texts=ATTRIBUTES))


def test_runs_of_several_seeds(
    compare: Command, refused: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    again = evaluation(tmp_path / "again", small_config, FIRST[::-1])
    second = evaluation(tmp_path / "second", small_config, SECOND)
    said = compare(f"{first},{again}", second, "--json", tmp_path / "found.json")
    assert f"1: {first} (dsmip), {again} (dsmip)" in said
    report = json.loads((tmp_path / "found.json").read_text())
    assert [run["run"] for run in report["runs"]] == [str(first), str(again), str(second)]
    assert report["runs_of_first"] == 2
    found, alone = report["metrics"]["hits@1"], metrics_of(FIRST)["hits@1"]
    assert (found["first"], found["deviations"]) == (alone, [0.0, None])
    assert "\u00b1" in said
    assert "is named twice" in refused(f"{first},{first}", second)
    for run in (first, again):
        (run / "run.json").write_text('{"seed": 3, "id": "abc"}')  # a copy is no other run
    assert "is named twice" in refused(f"{first},{again}", second)
    assert "RUN1 and RUN2 are a run each, or several with commas between" in refused(",", second)


def test_groups_of_several_seeds(compare: Command, small_config: ExperimentConfig, tmp_path: Path) -> None:
    """Means over each side's seeds; intervals of mentions and seeds together, also where a group is one mention."""
    seeds = zip("abcd", (FIRST, [9] * 6, SECOND, [0, 0, 0, 0, 0, 9]), strict=True)
    a, b, c, d = (evaluation(tmp_path / name, small_config, better) for name, better in seeds)
    said = compare(f"{a},{b}", f"{c},{d}", "--json", tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["groups"]["kind"] == {
        "": {"mentions": 1, "hits@1": [0.5, 0.5], "interval": [-1.0, 1.0]},
        "picture": {"mentions": 3, "hits@1": [0.0, 1.0], "interval": [1.0, 1.0]},
        "text": {"mentions": 2, "hits@1": [0.5, 0.75], "interval": [-0.5, 1.0]},
    }
    assert "+0.250 │ -0.500 to +1.000" in said


def test_a_group_of_many_values_is_in_the_file_alone(
    compare: Command, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    many = {name: [f"{name}{i}" for i in range(60)] for name in ("mention_id", "gold", "kind")}
    groups = pa.array([[("source", "x")]] * 60, pa.map_(pa.string(), pa.string()))
    columns = {**many, "tied": [0] * 60, "groups": groups}
    runs = [evaluation(tmp_path / name, small_config, [0] * 60, **columns) for name in "ab"]
    said = compare(*runs, "--json", tmp_path / "found.json")
    assert "kind: 60 values, which --json has" in said
    assert "kind59" not in said
    assert "source x" in said
    assert len(json.loads((tmp_path / "found.json").read_text())["groups"]["kind"]) == 60


def test_a_damaged_or_an_old_file_is_named(
    refused: Command, first: Path, small_config: ExperimentConfig, tmp_path: Path
) -> None:
    second = evaluation(tmp_path / "second", small_config, SECOND)
    path = second / evaluation_name("test", "dsmip") / "ranks.parquet"
    table = pq.read_table(path)
    for old in (table.replace_schema_metadata(None), table.drop_columns(["picture"])):
        pq.write_table(old, path)
        assert f"written by an older version; make it again: dsmip evaluate --run {second}" in refused(first, second)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"ranks.parquet: the file is damaged; make it again: dsmip evaluate --run {second}" in refused(first, second)


@pytest.mark.slow
def test_it_runs_without_ray(first: Path, small_config: ExperimentConfig) -> None:
    evaluation(first, small_config, SECOND, model="text")
    code = (
        "import sys; from ray_jobs import cli\n"
        f"sys.argv = ['dsmip', 'compare', {str(first)!r}, {str(first)!r}, '--model2', 'text']\n"
        "try: cli.main()\n"
        "finally: print('ray' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "2 - 1" in said
    assert said.rstrip().endswith("False")
