"""Tables, tests and the page of a suite, from ranks made up on the spot."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import pyarrow.parquet as pq
import pytest
import torch

from dsmip.errors import UserError
from dsmip.evaluation.metrics import adjusted
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.suites.figures import MentionKey, Result, compared, result_line, write_lines
from dsmip.suites.report import StepFailure, SuiteReport, protocol_tables, share_charts, write_report
from dsmip.suites.schema import Suite
from dsmip.suites.significance import grouped_test, holm
from dsmip.suites.tables import TableView, comparison_table, decline_table, figure_tables
from dsmip.suites.texts import latex, markdown
from tests.support.pages.suite_results import NUM_MENTIONS, ROWS, made_results, made_suite, result
from tests.support.small_release import HOSTILE


@pytest.fixture
def suite() -> Suite:
    return made_suite()


@pytest.fixture
def results() -> list[Result]:
    return made_results()


def pairs(folder: str, keys: Sequence[MentionKey]) -> list[int]:
    return [number // 2 for number in range(len(keys))]


def of(results: list[Result], row: str, share: float) -> list[Result]:
    return [each for each in results if (each.row.name, each.column.share) == (row, share)]


def test_every_other_row_is_tested_on_groups_and_corrected_over_all(suite: Suite, results: list[Result]) -> None:
    assert suite.significance is not None
    found = compared(results, suite.significance, pairs)
    assert [(each.other.name, each.column.share, each.best) for each in found] == [
        ("mimic", 0.1, True),
        ("mmoe", 0.1, False),
        ("mimic", 1.0, True),
        ("mmoe", 1.0, False),
    ]
    p_values = []
    for each in found:
        sides = []
        for row in ("dsmip", each.other.name):
            runs = of(results, row, each.column.share)
            keys = sorted(runs[0].evaluation.records)
            hits = [[float(run.evaluation.records[key]["better"] == 0) for key in keys] for run in runs]
            sides.append(torch.tensor(hits, dtype=torch.float64).mean(dim=0))
        expected = grouped_test(sides[0] - sides[1], pairs("", keys), torch.Generator().manual_seed(0))
        assert each.test == expected
        p_values.append(expected.p_value)
    assert [each.adjusted for each in found] == holm(p_values)


def test_evaluations_of_other_protocols_are_not_mixed(suite: Suite, results: list[Result]) -> None:
    assert suite.significance is not None
    other = [result(ROWS[1], 1.0, seed, [0] * NUM_MENTIONS, texts={"entity_text": "desc"}) for seed in (0, 1)]
    mixed = [*of(results, "dsmip", 1.0), *other]
    with pytest.raises(UserError, match=r"not evaluated alike: entity_text \(attr and desc\); take --across"):
        compared(mixed, suite.significance, pairs)
    assert compared(mixed, suite.significance, pairs, across=True)[0].test is not None


def test_what_cannot_be_tested_says_why(suite: Suite, results: list[Result]) -> None:
    assert suite.significance is not None
    one = [*of(results, "dsmip", 1.0), of(results, "mimic", 1.0)[0]]
    assert [each.why for each in compared(one, suite.significance, pairs)] == ["one seed in common"]
    fewer = [*of(results, "dsmip", 1.0), *(result(ROWS[1], 1.0, seed, [0, 1]) for seed in (0, 1))]
    assert [each.why for each in compared(fewer, suite.significance, pairs)] == ["different mentions or golds"]


def test_figures_stand_beside_published_ones(suite: Suite, results: list[Result]) -> None:
    assert suite.significance is not None
    tested = compared(results, suite.significance, pairs)
    low, whole = figure_tables(suite, ROWS, results, tested)
    assert low.title == "WikiMEL_&%, the first 10 % of its training mentions"
    assert low.header == ("system", "hits@1, %", "mean_rank", "seeds", "p, Holm")  # nothing is published of a share
    assert whole.header == ("system", "hits@1, %", "published", "mean_rank", "published", "seeds", "p, Holm")
    values = [each.metrics["hits@1"] for each in of(results, "dsmip", 1.0)]
    texts = [entry.text for entry in whole.rows[0]]
    assert texts[:3] == ["DSMIP", f"{100 * fmean(values):.2f} \u00b1 {100 * stdev(values):.2f}", "88.97"]
    assert texts[3:] == [texts[3], "10.37", "2 of 2", "-"]
    assert [row[1].bold for row in whole.rows] == [True, False, False]
    assert whole.rows[2][2].text == "90.77\u2020"  # MMoE's is of other texts
    assert any("entity_text is attr, there desc" in note for note in whole.notes)
    tests = comparison_table(suite, tested)
    assert tests is not None
    assert len(tests.rows) == 4
    assert "(best)" in tests.rows[2][1].text


def test_decline_is_relative_to_all_training_mentions(suite: Suite, results: list[Result]) -> None:
    table = decline_table(suite, ROWS, results)
    assert table is not None
    low, whole = (fmean(each.metrics["hits@1"] for each in of(results, "dsmip", share)) for share in (0.1, 1.0))
    assert table.rows[0][1].text == f"{100 * (whole - low) / whole:.1f} %"
    assert len(share_charts(suite, ROWS, results)) == 2


def test_texts_stay_texts_in_markdown_and_latex(suite: Suite, results: list[Result]) -> None:
    table = figure_tables(suite, ROWS, results, [])[1]
    written = latex(table, "tab:x")
    assert r"WikiMEL\_\&\%" in written
    assert written.count(r"\textbf{") == 2
    assert re.search(r"(?<!\\)[&%#_]", re.sub(r" & |\\label.*", "", written)) is None
    lines = markdown(table).splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    assert set(cells) == {len(table.header) + 1}
    assert "<" not in re.sub(r"\\<", "", "\n".join(lines))


def test_the_page_is_one_file_without_script_and_its_style_is_let_in(
    suite: Suite, results: list[Result], tmp_path: Path
) -> None:
    failure = StepFailure(HOSTILE, HOSTILE, "log", (HOSTILE,))
    tables = (*figure_tables(suite, ROWS, results, []), TableView(HOSTILE, (HOSTILE,), ()))
    charts, protocols = tuple(share_charts(suite, ROWS, results)), tuple(protocol_tables(suite, results))
    write_report(tmp_path, SuiteReport("x", HOSTILE, HOSTILE, tables, charts, protocols, (HOSTILE,), (failure,)))
    page = (tmp_path / "results.html").read_text()
    assert HOSTILE not in page
    assert "<script" not in page
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src &#39;none&#39;; style-src &#39;sha256-{digest}&#39;" in page
    assert page.count('<svg class="chart"') == 2
    assert (tmp_path / "results.md").is_file()
    assert (tmp_path / "results.tex").is_file()


def test_every_run_has_a_line_in_results_parquet(results: list[Result], tmp_path: Path) -> None:
    write_lines(tmp_path / "results.parquet", [result_line("own", each) for each in results])
    lines = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(each["row"], each["share"], each["seed"]) for each in lines] == [
        (each.row.name, each.column.share, each.seed) for each in results
    ]
    assert lines[0]["hits@1"] == results[0].metrics["hits@1"]
    protocol = results[0].evaluation.protocol
    assert protocol is not None
    assert lines[0]["adjusted_mrr"] == adjusted(results[0].metrics, protocol.entities)["mrr"]
    assert EvaluationProtocol.read(lines[0]["protocol"].encode()) == results[0].evaluation.protocol
