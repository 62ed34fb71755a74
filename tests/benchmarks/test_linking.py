"""The benchmark of bulk linking at a size of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsmip.runs.run import Run
from tests.support.paths import ROOT


@pytest.mark.soak
def test_it_measures_the_ways_against_the_bare_loop(run: Run, tmp_path: Path) -> None:
    arguments = ["--run", str(run.folder), "--mentions", "60", "--block", "10", "--workers", "2"]
    command = [sys.executable, "-m", "benchmarks.linking", *arguments, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["way"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows) == ["bare loop", "one process", "2 Ray workers"]
    for row in rows.values():
        assert row["share"] == pytest.approx(row["per_second"] / rows["bare loop"]["per_second"])
    assert "mentions/s" in done.stdout
