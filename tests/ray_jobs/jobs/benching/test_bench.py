"""`dsmip bench`: what is refused before anything runs, parameter counts without data, and a small suite to its end."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.runs.load_config import changed, to_yaml
from dsmip.runs.run import Run
from dsmip.suites.members import suite_members
from dsmip.suites.schema import Suite, load_suite
from dsmip.suites.steps import Places
from ray_jobs import cli

Refused = Callable[..., str]


@pytest.fixture
def root(small_data: Dataset, tmp_path: Path) -> Path:
    """A data root with one set, and the same prepared from other texts."""
    for name in ("small", "small_desc"):
        shutil.copytree(small_data.folder, tmp_path / "root" / name)
    path = tmp_path / "root" / "small_desc" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "choices": {**manifest["choices"], "entity_text": "desc"}}))
    return tmp_path / "root"


@pytest.fixture
def suite(tmp_path: Path, small_config: ExperimentConfig) -> Callable[..., Path]:
    """Writes a suite of a small DSMIP, with changes, and returns its file."""
    (tmp_path / "small.yaml").write_text(to_yaml(small_config))

    def write(**changes: Any) -> Path:
        base = {
            "title": "Small",
            "data": {"small": {}},
            "systems": {
                "dsmip": {"config": str(tmp_path / "small.yaml"), "rows": {"dsmip": "DSMIP", "text": "Text alone"}}
            },
            "seeds": [0, 1],
            "significance": {"of": "dsmip"},
        }
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**base, **changes}))
        return path

    return write


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`dsmip bench`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dsmip", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs `dsmip bench`, which must end with exit code 2 and one line, and make nothing; returns the line."""

    def bench(*arguments: object) -> str:
        before = set((tmp_path / "out").rglob("*"))
        assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert set((tmp_path / "out").rglob("*")) == before
        return said.err

    return bench


def test_what_is_wrong_is_said_before_anything_runs(
    refused: Refused, suite: Callable[..., Path], root: Path, tmp_path: Path
) -> None:
    assert "neither a file nor a shipped name" in refused("tabel1")
    assert "--data-root: name the folder of wikimel" in refused("table2")
    assert f"has no data set wikimel; make it: dsmip prepare RELEASE {root}/wikimel" in refused(
        "table2", "--data-root", root
    )
    assert "--only dsnip: neither a data set nor a system of the suite; there are small, dsmip" in refused(
        suite(), "--data-root", root, "--only", "dsnip"
    )
    assert "significance is asked of one seed" in refused(suite(seeds=[7]), "--data-root", root)
    drawn = {"data": {"small": {"drawn": {"num_entitis": 100}}}}
    assert "data.small.drawn.num_entitis" in refused(suite(**drawn))
    assert "config 'demu' is neither" in refused(suite(data={"small": {"backbone": "demu"}}), "--data-root", root)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").touch()
    assert "is not empty and holds no suite" in refused(suite(), "--data-root", root)


def test_members_of_other_texts_are_refused_unless_across(
    refused: Refused,
    suite: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(tmp_path / "small.yaml")
    systems = {"dsmip": {"config": config}, "other": {"config": config, "data": {"small": "small_desc"}}}
    path = suite(systems=systems)
    said = refused(path, "--data-root", root)
    assert "small: small and small_desc are not alike: entity_text (attr and desc); take --across" in said
    listed = ["--data-root", root, "--out", tmp_path / "out", "--across", "--dry-run"]
    assert run(monkeypatch, path, *listed) == 0
    said = capsys.readouterr().out
    assert said.count(f"--data {root / 'small_desc'} ") == 2
    assert "12 steps, 0 of them done" in said
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_settings_is_not_taken_for_a_member(
    refused: Refused, suite: Callable[..., Path], root: Path, tmp_path: Path, small_config: ExperimentConfig
) -> None:
    out = tmp_path / "out"
    path = suite()
    out.mkdir()
    (out / "bench.json").write_text(json.dumps({"suite": "another", "title": ""}))
    assert f"--out {out} holds the suite another" in refused(path, "--data-root", root)
    (out / "bench.json").write_text(json.dumps({"suite": str(path), "title": ""}))
    other = changed(small_config, {"tune": {"trials": 1, "rungs": [2], "space": {}}, "train": {"epochs": 3}})
    Run.create(out / "runs" / "small" / "dsmip" / "seed-0", other, Dataset.open(root / "small"))
    said = refused(path, "--data-root", root)
    assert "was made with other settings (train.epochs was 3, is now 2); use another --out" in said


def test_what_was_drawn_by_other_settings_is_no_data_of_the_suite(
    refused: Refused, suite: Callable[..., Path], tmp_path: Path, small_data: Dataset
) -> None:
    out, path = tmp_path / "out", suite(data={"small": {"drawn": {"seed": 1, "num_entities": 100}}})
    world = out / "configs" / "small" / "world.yaml"
    world.parent.mkdir(parents=True)
    world.write_text(yaml.safe_dump({"seed": 1, "num_entities": 90}))
    shutil.copytree(small_data.folder, out / "data" / "small")
    (out / "bench.json").write_text(json.dumps({"suite": str(path), "title": ""}))
    assert f"--out {out} holds small drawn by other settings ({world}); use another --out" in refused(path)


def test_evaluations_that_were_not_made_alike_are_told_before_anything_runs(
    refused: Refused, suite: Callable[..., Path], root: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", suite()
    protocol = EvaluationProtocol(
        entities=3, entities_sha256="", texts={}, split="test", mentions=2, mentions_sha256="", seed=0, versions={}
    )
    for seed, model, made in ((0, "dsmip", protocol), (1, "text", protocol.model_copy(update={"entities": 4}))):
        written = out / "runs" / "small" / "dsmip" / f"seed-{seed}" / "evaluate" / "test" / model / "metrics.json"
        written.parent.mkdir(parents=True)
        written.write_text(json.dumps({"protocol": made.model_dump(mode="json")}))
    (out / "bench.json").write_text(json.dumps({"suite": str(path), "title": ""}))
    said = refused(path, "--data-root", root)
    assert "were not evaluated alike: entities (3 and 4); delete the one that is not to be compared" in said
    written.write_text("{")
    assert f"{written} is damaged" in refused(path, "--data-root", root)


def test_a_run_of_another_share_is_not_taken_for_a_member(
    refused: Refused,
    suite: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, path = tmp_path / "out", suite(shares=[0.5])
    of_suite = load_suite(str(path))
    assert isinstance(of_suite, Suite)
    member, places = suite_members(of_suite, "", out)[0], Places(root, out)
    made = CliRunner().invoke(
        cli.app, ["prepare", str(root / "small"), str(places.data(of_suite, member)), "--train-fraction", "0.5"]
    )
    assert made.exit_code == 0, made.output
    (out / "bench.json").write_text(json.dumps({"suite": str(path), "title": ""}))
    Run.create(places.run(member), member.config, Dataset.open(root / "small"))
    other = f"was made on other data than {places.data(of_suite, member)} holds now"
    assert other in refused(path, "--data-root", root)
    shutil.rmtree(places.run(member))
    Run.create(places.run(member), member.config, Dataset.open(places.data(of_suite, member)))
    assert run(monkeypatch, path, "--data-root", root, "--out", out, "--dry-run") == 0
    capsys.readouterr()
    manifest = root / "small" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "licence": "another"}))  # the base is replaced
    assert other in refused(path, "--data-root", root)
    (places.data(of_suite, member) / "manifest.json").unlink()
    assert other in refused(path, "--data-root", root)


def test_parameters_are_counted_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "table3", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "151.72" in said
    lines = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert [each["row"] for each in lines] == ["clip_encoder", "prompt_encoder"]
    assert lines[1]["trained"] == pytest.approx(7.6e6, rel=0.01)  # as the paper counts
    assert "7.6" in (tmp_path / "out" / "results.tex").read_text()
    assert (tmp_path / "out" / "results.html").is_file()


def finished_runs(path: Path, root: Path, out: Path) -> None:
    """Runs of the suite's first system whose parts are finished and know nothing, so that they need be ranked only."""
    suite = load_suite(str(path))
    assert isinstance(suite, Suite)
    places = Places(root, out)
    for member in suite_members(suite, "", out):
        if member.system == "dsmip":
            made = Run.create(places.run(member), member.config, Dataset.open(root / "small"))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(member.seed)
                for name in made.part_names:
                    made.save_part(name, made.system.build_part(name, member.config, with_encoder=True), {})
                made.save_part("dsmip", made.system.build_whole(member.config), {})
    (out / "bench.json").write_text(json.dumps({"suite": str(path), "title": ""}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_suite_goes_on_past_a_member_that_fails_and_repeats_nothing(
    suite: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = {"of": "dsmip", "set": {"backbone": {"pretrained": str(tmp_path / "missing.safetensors")}}}
    path, out = suite(ablations={"broken": missing}), tmp_path / "out"
    finished_runs(path, root, out)
    arguments = (path, "--data-root", root, "--out", out)
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert "2 steps failed: small/broken/seed-0/train, small/broken/seed-1/train" in said.err
    assert "small/broken/seed-1/tune: left out" in said.out
    assert "missing.safetensors" in said.out
    lines = pq.read_table(out / "results.parquet").to_pylist()
    assert [(each["row"], each["seed"]) for each in lines] == [
        ("dsmip", 0),
        ("dsmip/text", 0),
        ("dsmip", 1),
        ("dsmip/text", 1),
    ]
    stored = json.loads((out / "runs/small/dsmip/seed-1/evaluate/test/text/metrics.json").read_text())
    assert lines[3]["mrr"] == stored["overall"]["mrr"]
    page = (out / "results.html").read_text()
    assert "small/broken/seed-0/train" in page
    assert "missing.safetensors" in page
    assert "2 of 6 figures are missing" in page
    assert "Text alone" in (out / "results.md").read_text()

    made = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/dsmip/**/metrics.json")}
    assert len(made) == 4
    assert run(monkeypatch, *arguments, "--only", "dsmip") == 0  # all of it is there
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert "8 steps, 8 of them done" in capsys.readouterr().out
