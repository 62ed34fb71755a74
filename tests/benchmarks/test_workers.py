"""The benchmark of data-parallel workers at a size of seconds."""

import json
from pathlib import Path

import pytest

from benchmarks.training import workers


@pytest.mark.soak
def test_two_workers_are_compared_with_one_and_with_loops_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "workers.json"
    options = ["--parts", "visual", "--rounds", "1", "--steps", "1", "--batch-size", "4", "--work", str(tmp_path)]
    workers.main([*options, "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["part"] == "visual"
    assert row["two_workers"] > 0
    assert row["two_bare_loops"] > 0
    assert row["sent_bytes_per_step"] > 4 * 100_000  # its parameters' gradients at least
