"""The benchmark of serving at a size of seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dsmip
from benchmarks.data.big_bundle import write_big_bundle
from dsmip.runs.run import Run
from tests.support.paths import ROOT


def measured(*arguments: str, rows: Path) -> Any:
    """The one row of a measurement."""
    options = ("--seconds", "1", "--clients", "2", "--json", str(rows))
    command = [sys.executable, "-m", "benchmarks.serving", *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "mentions/s" in done.stdout
    (row,) = json.loads(rows.read_text())["rows"]
    return row


@pytest.mark.soak
def test_it_measures_clients_against_the_bare_loop(run: Run, tmp_path: Path) -> None:
    row = measured("--run", str(run.folder), rows=tmp_path / "rows.json")
    assert row["clients"] == 2
    assert row["share"] == pytest.approx(row["per_second"] / row["bare_per_second"])
    assert 0 < row["share_least"] <= row["share_same_batch"] <= row["share_most"]
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["encoding_ms"] > 0


@pytest.mark.slow
def test_a_generated_bundle_has_as_many_entities_as_are_asked_for(narrow_backbone: Path, tmp_path: Path) -> None:
    bundle, mentions = write_big_bundle(tmp_path, 150, "mimic", str(narrow_backbone))
    linker = dsmip.load(bundle)
    assert len(linker) == 150
    links = linker.link_many(mentions[:3], top=150)
    assert all(len({link.score for link in each}) == 150 for each in links)  # no two tie
    assert len(linker.link(mentions[0].word, top=3, candidates=20)) == 3
