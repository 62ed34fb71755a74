"""What users have stored stays readable and is used: a data directory and a run that an earlier commit wrote.

Their features are taken and not computed again, their ranks come out the same, and what is computed anew is the same.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dsmip.config import flat
from dsmip.data.manifest import KB, SPLITS
from dsmip.data.table import Ragged, Table
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_cache import encode_split
from dsmip.runs.load_config import swept
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from ray_jobs.cli import app
from tests.support.old_run import unpack

CPU = torch.device("cpu")
PARTS = ("text", "visual", "multimodal", "gate")
SCORES = "top_scores"
OLD_NAMES = {"word": "ambiguity"}
FIGURES = ("overall", "groups", "experts", "mentions", "entities")
EVALUATED = [("test", "dsmip"), ("test", "text"), ("validation", "multimodal")]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it was written; nothing is changed below it."""
    return unpack(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """Of one test's own."""
    return unpack(tmp_path)


@pytest.fixture
def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("an encoder was called: the stored features were not taken")

    for method in ("encode_text", "encode_image", "token_embedding_mean"):
        monkeypatch.setattr(Backbone, method, refuse)


def command(*arguments: object) -> str:
    """What a command prints, which must end well."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def numbers(table: Table) -> dict[str, Tensor]:
    """All columns as dense tensors; tokens of all items one after the other, after how many each has."""
    found = {}
    for name, column in table.columns.items():
        if isinstance(column, Ragged):
            found[name], found[f"{name}/lengths"] = column.compact().values, column.lengths
        else:
            found[name] = table.dense(name)
    return found


def assert_close(found: Table, expected: Table) -> None:
    """Columns that have come since are passed over."""
    now = numbers(found)
    for name, values in numbers(expected).items():
        torch.testing.assert_close(now[name], values, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


def test_the_data_set_is_read(stored: Path) -> None:
    data = Run.open(stored / "run").dataset
    assert data.manifest_hash == json.loads((stored / "run/run.json").read_text())["data"]["sha256"]
    assert [data.num_entities, *map(data.num_mentions, SPLITS)] == [9, 16, 5, 7]
    assert [len(entity.images) for entity in data.entities()] == [0, 1, 1] * 3
    mentions = list(data.mentions("test"))
    assert [mention.mention_id for mention in mentions] == [f"m{number}" for number in range(21, 28)]
    assert [mention.image is not None for mention in mentions] == [number % 3 > 0 for number in range(21, 28)]
    command("verify", stored / "data")


def test_its_state_is_told(stored: Path) -> None:
    json_file = stored / "status.json"
    command("status", stored / "run", "--json", json_file)
    status = json.loads(json_file.read_text())
    assert status["problems"] == []
    assert {part["name"].split("-")[0]: part["state"] for part in status["parts"]} == dict.fromkeys(
        ("text", "visual", "multimodal", "dsmip"), "finished"
    )
    assert [(each["split"], each["model"]) for each in status["evaluations"]] == EVALUATED
    assert (len(status["trials"]), status["next"]) == (2, "nothing: trained, tuned and evaluated")


def test_every_part_is_loaded(stored: Path) -> None:
    run = Run.open(stored / "run")
    for part in run.part_names:
        for with_encoder in (True, False):
            run.load_part(part, with_encoder=with_encoder)
    run.load_whole()
    (changes,) = (changes for changes in _sweep(stored)["trials"].values() if changes)
    home = run.home("multimodal", swept(run.config, changes))
    assert home.folder != run.folder
    home.load_part("multimodal", with_encoder=True)


def test_what_is_trained_is_not_trained_again(moved: Path) -> None:
    run = moved / "run"
    said = command("train", "--config", run / "config.yaml", "--data", moved / "data", "--run", run)
    assert said.count("finished already") == 3


def test_stored_features_are_found(stored: Path) -> None:
    """Of every part and split; the whole reads the multimodal expert of other settings, which the sweep has chosen."""
    run = Run.open(stored / "run")
    config = run.whole_config()
    for part in PARTS:
        home = run.home(part, config)
        assert (home.folder == run.folder) == (part != "multimodal")
        features = PartFeatures(home, part, config)
        assert {features.cached(split) for split in (KB, *SPLITS)} == {*home.folder.glob(f"features/{part}-*")}


@pytest.mark.usefixtures("nothing_is_encoded")
@pytest.mark.parametrize("keep_index", [True, False])
def test_an_evaluation_takes_stored_features_and_gives_the_same_ranks(moved: Path, keep_index: bool) -> None:
    run = moved / "run"
    before = {each: (_ranks(run, *each), _figures(run, *each)) for each in EVALUATED}
    features = {path: path.stat().st_mtime_ns for path in run.glob("**/features/*")}
    shutil.rmtree(run / "evaluate")
    if not keep_index:
        shutil.rmtree(run / "index")
    for split, model in EVALUATED:
        command("evaluate", "--run", run, "--split", split, "--model", model)
        now, (then, figures) = _ranks(run, split, model), before[split, model]
        assert _figures(run, split, model) == pytest.approx(figures, rel=1e-6)
        torch.testing.assert_close(torch.tensor(now.pop(SCORES)), torch.tensor(then.pop(SCORES)), rtol=1e-4, atol=1e-4)
        assert {name: now[name] for name in then} == then
    assert {path: path.stat().st_mtime_ns for path in run.glob("**/features/*")} == features


def test_an_old_evaluation_is_compared_with(moved: Path) -> None:
    command("evaluate", "--run", moved / "run", "--split", "test", "--model", "visual")
    arguments = ["--model1", "text", "--model2", "visual", "--json", moved / "found.json"]
    command("compare", moved / "run", moved / "run", *arguments)
    assert json.loads((moved / "found.json").read_text())["num_mentions"] == 7


@pytest.mark.parametrize("part", PARTS)
def test_features_computed_anew_are_the_stored_ones(stored: Path, tmp_path: Path, part: str) -> None:
    run = Run.open(stored / "run")
    features = PartFeatures(run, part, run.config)
    for split in (KB, "validation"):
        file, collator = tmp_path / f"{split}.safetensors", features.collator
        encode_split(file, split, features.encoder, run.dataset, collator, CPU)
        cached = features.cached(split)
        assert cached
        assert_close(Table.load(file), Table.load(cached))


@pytest.mark.parametrize(("split", "model"), EVALUATED)
def test_an_index_made_anew_is_the_stored_one(moved: Path, split: str, model: str) -> None:
    """From pictures and texts; column by column. The layout of slices alone may have changed what it is made from."""
    run = moved / "run"
    before, features = run.rename(moved / "before") / "index", moved / "before/features"
    shutil.copytree(moved / "before", run)
    shutil.rmtree(run / "index")
    for file in features.iterdir():
        (run / "features" / file.name).unlink()
    command("evaluate", "--run", run, "--split", split, "--model", model)
    (old,), (new,) = before.glob(f"{model}-*"), (run / "index").glob(f"{model}-*")
    for name in ("slice-000000.safetensors", f"{split}.safetensors"):
        assert_close(Table.load(new / name), Table.load(old / name))
    made_from = [json.loads((folder / "index.json").read_text())["made_from"] for folder in (old, new)]
    assert {**made_from[0], "layout": None} == {**made_from[1], "layout": None}


@pytest.mark.parametrize("part", ["text", "multimodal"])
def test_a_training_gives_the_same_figures(moved: Path, tmp_path: Path, part: str) -> None:
    """From cached features (text), and from shards with prompts in the towers (multimodal)."""
    run = Run.open(moved / "run")
    before = run.part_report(part)["history"]
    now = train_part(run, part, LocalContext(tmp_path / "checkpoints")).history
    assert [epoch.keys() for epoch in now] == [epoch.keys() for epoch in before]
    for found, expected in zip(now, before, strict=True):
        for name in ("loss", "mrr", "hits@1", "mean_rank"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_a_training_goes_on_from_a_stored_checkpoint(moved: Path, tmp_path: Path) -> None:
    run = Run.open(moved / "run")
    first = min((moved / "run/ray/text").glob("checkpoint_*"))  # after one of two epochs
    shutil.copytree(first, tmp_path / "checkpoints/epoch-0001-step-0000000")
    epochs: list[float] = []
    context = LocalContext(tmp_path / "checkpoints", on_epoch=lambda metrics: epochs.append(metrics["epoch"]))
    before = run.part_report("text")["history"]
    now = train_part(run, "text", context).history
    assert (epochs, now[0]) == ([1.0], before[0])
    assert now[1]["loss"] == pytest.approx(before[1]["loss"], rel=1e-3)


def _sweep(stored: Path) -> dict[str, Any]:
    sweep: dict[str, Any] = json.loads((stored / "run/tune/sweep.json").read_text())
    return sweep


def _figures(run: Path, split: str, model: str) -> dict[str, Any]:
    """What papers report and reported then, by dotted name; not how it was computed."""
    metrics = json.loads((run / f"evaluate/{split}/{model}/metrics.json").read_text())
    metrics.get("experts", {}).pop("best", None)
    metrics["groups"] = {OLD_NAMES.get(name, name): values for name, values in metrics["groups"].items()}
    leaves = flat({name: metrics[name] for name in (*FIGURES, "confidence") if name in metrics})
    of_each = {name: leaf if isinstance(leaf, list) else [leaf] for name, leaf in leaves.items()}
    return {f"{name}/{number}": leaf for name, leaves in of_each.items() for number, leaf in enumerate(leaves)}


def _ranks(run: Path, split: str, model: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(run / f"evaluate/{split}/{model}/ranks.parquet").to_pydict()
    return columns if "ambiguity" in columns else {OLD_NAMES.get(name, name): columns[name] for name in columns}
