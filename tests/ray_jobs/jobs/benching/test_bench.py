"""`dsmip bench`: what is refused before anything runs, parameter counts without data, and a small suite to its end."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import changed, to_yaml
from dsmip.runs.run import Run
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
        assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert not (tmp_path / "out" / "configs").exists()
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_a_suite_goes_on_past_a_member_that_fails(
    suite: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = {"of": "dsmip", "set": {"backbone": {"pretrained": str(tmp_path / "missing.safetensors")}}}
    path, out = suite(ablations={"broken": missing}, shares=[0.5, 1.0]), tmp_path / "out"
    arguments = (path, "--data-root", root, "--out", out)
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert "4 steps failed: small-50/broken/seed-0/train" in said.err
    assert "missing.safetensors" in said.out
    lines = pq.read_table(out / "results.parquet").to_pylist()
    assert len(lines) == 2 * 2 * 2  # shares, seeds and rows, of the system that works
    metrics = json.loads((out / "runs/small-50/dsmip/seed-1/evaluate/test/text/metrics.json").read_text())
    [line] = [each for each in lines if (each["row"], each["share"], each["seed"]) == ("dsmip/text", 0.5, 1)]
    assert line["mrr"] == metrics["overall"]["mrr"]
    page = (out / "results.html").read_text()
    assert "small-50/broken/seed-0/train" in page
    assert "Text alone" in (out / "results.md").read_text()

    made = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/dsmip/**/*.json")}
    assert run(monkeypatch, *arguments) == 1
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert "of them done" in capsys.readouterr().out
