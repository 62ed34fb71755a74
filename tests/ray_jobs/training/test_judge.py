"""Warnings about a gate that does not earn its place, and what stands beside an evaluated one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.local_jobs.beside import beside
from ray_jobs.training.judge import gate_warnings

FIGURES = {"text": 0.2, "visual": 0.3, "multimodal": 0.4, "mean": 0.5, "product": 0.45}


def judged(gold_share: dict[str, float], **mrr: float) -> dict[str, Any]:
    return {"gold_share": gold_share, "validation": {name: {"mrr": value} for name, value in (FIGURES | mrr).items()}}


@pytest.mark.parametrize(
    ("share", "mrr", "said"),
    [
        (0.6, 0.51, []),
        (0.98, 0.51, []),
        (0.981, 0.51, ["the gate has collapsed: it chooses visual for 98.1% of the validation golds"]),
        (0.6, 0.5, ["better than its experts' calibrated mean (mean): validation MRR 0.5000 against 0.5000"]),
        (
            0.6,
            0.39,
            [
                "better than its best expert (multimodal): validation MRR 0.3900 against 0.4000",
                "better than its experts' calibrated mean (mean): validation MRR 0.3900 against 0.5000",
                "better than its experts' product (product): validation MRR 0.3900 against 0.4500",
            ],
        ),
    ],
)
def test_a_gate_that_does_not_earn_its_place_is_told(share: float, mrr: float, said: list[str]) -> None:
    shares = {"text": 1 - share, "visual": share, "multimodal": 0.0}
    lines = gate_warnings("dsmip", {"mrr": mrr}, judged(shares))
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def evaluated(folder: Path, better: list[int]) -> Path:
    folder.mkdir()
    hits = sum(count == 0 for count in better) / len(better)
    (folder / "metrics.json").write_text(json.dumps({"overall": {"hits@1": hits}}))
    kind = pa.array([None] * 3, pa.string())
    table = pa.table({"mention_id": ["a", "b", "c"], "better": better, "tied": [0, 0, 0], "kind": kind})
    pq.write_table(table, folder / "ranks.parquet")
    return folder


def test_beside_a_gate_stand_its_best_expert_the_fusions_and_the_oracle(tmp_path: Path) -> None:
    folders = {
        "text": evaluated(tmp_path / "text", [0, 1, 5]),
        "visual": evaluated(tmp_path / "visual", [3, 0, 0]),
        "mean": evaluated(tmp_path / "mean", [0, 1, 0]),
    }
    found = {title: round(figures["hits@1"], 2) for title, figures in beside(folders, ["text", "visual"])}
    assert found == {
        "best expert, visual": 0.67,
        "mean of the experts, without a gate": 0.67,
        "oracle, each mention by the expert that ranks its gold best": 1.0,
    }
    alone = {name: folder for name, folder in folders.items() if name != "text"}
    assert [title for title, _ in beside(alone, ["text", "visual"])] == ["mean of the experts, without a gate"]
