"""TREC files of ranks: another tool reads them and finds the same figures."""

from pathlib import Path
from typing import Any

import ir_measures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ir_measures import RR, Success
from typer.testing import CliRunner

import dsmip
from dsmip.evaluation.stored.layout import RANKS, evaluation_name
from dsmip.evaluation.stored.ranks import read_ranks
from dsmip.exporting.trec import QRELS_FILE, RUN_FILE, write_trec
from dsmip.runs.run import Run
from ray_jobs.cli import app

MEASURES = {"hits@1": Success @ 1, "hits@3": Success @ 3, "mrr": RR}


def figures(folder: Path) -> dict[str, float]:
    """As another tool computes them from the files."""
    tool: Any = ir_measures
    qrels, run = tool.read_trec_qrels(str(folder / QRELS_FILE)), tool.read_trec_run(str(folder / RUN_FILE))
    found = tool.calc_aggregate(list(MEASURES.values()), list(qrels), list(run))
    return {name: found[measure] for name, measure in MEASURES.items()}


@pytest.fixture
def stored(run: Run, tmp_path: Path) -> Any:
    """Makes ranks of a run's folder out of rows, and reads them."""

    def made(rows: list[dict[str, Any]]) -> Any:
        path = tmp_path / "run" / evaluation_name("test", "dsmip") / RANKS
        path.parent.mkdir(parents=True)
        for name in ("run.json", "config.yaml"):
            (tmp_path / "run" / name).write_bytes((run.folder / name).read_bytes())
        pq.write_table(pa.Table.from_pylist(rows), path)
        return read_ranks(tmp_path / "run", "test", None)

    return made


def test_another_tool_finds_the_same_figures(run: Run, tmp_path: Path) -> None:
    metrics = dsmip.evaluate(run.folder, "test", "text").metrics["overall"]
    done = CliRunner().invoke(app, ["export-ranks", str(run.folder), "--model", "text", "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert "8 mentions of test, 11 entities each" in done.output.replace("\n", "")
    assert figures(tmp_path / "new") == pytest.approx({name: metrics[name] for name in MEASURES})


def test_ids_stay_apart_and_in_one_word(stored: Any, tmp_path: Path) -> None:
    rows = [
        {"mention_id": mention_id, "gold": gold, "top": ["Q 1", "Q2"], "top_scores": [2.0, 1.5]}
        for mention_id, gold in (("a b", "Q2"), ("m", "Q 1"), ("m", "Q9"), ("5%", "Q2"), ("m#2", "Q2"))
    ]
    files = write_trec(stored(rows), tmp_path / "new")
    assert (files.mentions, files.depth, files.golds_outside, files.by_rank) == (5, 2, 1, False)
    lines = files.run.read_text().splitlines()
    assert lines[0] == "a%20b Q0 Q%201 1 2.0 dsmip"
    assert [line.split()[0] for line in lines[::2]] == ["a%20b", "m", "m#2", "5%25", "m%232"]
    assert files.qrels.read_text().splitlines() == [
        "a%20b 0 Q2 1",
        "m 0 Q%201 1",
        "m#2 0 Q9 1",
        "5%25 0 Q2 1",
        "m%232 0 Q2 1",
    ]
    assert figures(tmp_path / "new") == pytest.approx({"hits@1": 0.2, "hits@3": 0.8, "mrr": 0.5})


@pytest.mark.parametrize("scores", [[1.0, 1.0], [1.0, 1.0 - 1e-12], [0.5, 3.0]])
def test_scores_that_do_not_keep_the_order_are_replaced(stored: Any, tmp_path: Path, scores: list[float]) -> None:
    """Ties, differences below single precision, and a re-ranker's candidates before others."""
    rows = [{"mention_id": "m", "gold": "Q1", "top": ["Q1", "Q2"], "top_scores": scores}]
    files = write_trec(stored(rows), tmp_path / "new")
    assert files.by_rank
    assert figures(tmp_path / "new")["hits@1"] == 1.0


def test_what_cannot_be_exported_is_one_line(run: Run, stored: Any, tmp_path: Path) -> None:
    older = stored([{"mention_id": "m", "gold": "Q1"}])
    with pytest.raises(dsmip.UserError, match="written by an older version; make it again: dsmip evaluate"):
        write_trec(older, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for arguments, said in (
        (["--split", "dev"], "unknown split 'dev'"),
        (["--split", "train"], "has no evaluation of 'dsmip' on train; make it: dsmip evaluate"),
    ):
        done = CliRunner().invoke(app, ["export-ranks", str(run.folder), *arguments, "--out", str(tmp_path / "new")])
        assert said in str(done.exception)
