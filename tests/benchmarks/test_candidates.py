"""The benchmark of candidates at a size of seconds."""

import json
from pathlib import Path

import pytest

from benchmarks.ranking import candidates
from dsmip.runs.run import Run


@pytest.mark.soak
def test_recalls_and_costs_of_a_run_and_of_a_generated_bundle(
    run: Run, narrow_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    generated = ["--entities", "150", "--system", "mimic", "--architecture", str(narrow_backbone)]
    candidates.main([str(run.folder), "--model", "multimodal", *generated, "--rounds", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [(row["vectors"], row["k"]) for row in found["recalls"]] == [("global", 10), ("distilled", 10)]
    assert all(0 <= row[name] <= 1 for row in found["recalls"] for name in ("best", "gold"))
    assert [(row["entities"], row["vectors"]) for row in found["costs"]] == [
        (11, "global"),
        (11, "distilled"),
        (150, "global"),
        (150, "distilled"),
    ]
    assert all(row["ratio"] == pytest.approx(row["exact_ms"] / row["candidates_ms"]) for row in found["costs"])
    assert "exact best" in capsys.readouterr().out
