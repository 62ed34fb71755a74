"""The benchmark of serving at a size of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsmip.runs.run import Run
from tests.support.paths import ROOT


@pytest.mark.soak
def test_it_measures_clients_against_the_bare_loop(run: Run, tmp_path: Path) -> None:
    arguments = ["--run", str(run.folder), "--seconds", "1", "--clients", "2", "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["clients"] == 2
    assert row["share"] == pytest.approx(row["per_second"] / row["bare_per_second"])
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert "mentions/s" in done.stdout
