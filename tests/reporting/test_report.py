"""The page of a report: its figures are the stored ones, what is missing has its command, nothing is half done."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dsmip.calibration.calibration import Calibration
from dsmip.errors import UserError
from dsmip.evaluation.metrics import shown_metrics
from dsmip.progress import no_progress
from dsmip.reporting.evaluations import read_evaluated_run
from dsmip.reporting.mentions import shown_mentions
from dsmip.reporting.page import ReportOptions, write_report
from dsmip.runs.run import Run
from dsmip.storage.locations import open_run_storage
from ray_jobs import cli
from tests.support.small_release import HOSTILE

Report = Callable[..., "Page"]


class Page(HTMLParser):
    """Texts, numbers and embedded data of a page.

    Attributes:
        numbers: Values of `data` elements by the section that they are in.
        text: Of all but scripts and styles.
        mentions: What the script reads.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.numbers: dict[str, list[float]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._section, self._raw = "", "", ""
        self.feed(self.source)
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        assert found
        self.mentions = json.loads(found[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "section":
            self._section = values["id"] or ""
        if tag == "data":
            self.numbers.setdefault(self._section, []).append(float(values["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data


@pytest.fixture
def report(reported: Path, tmp_path: Path) -> Report:
    """Writes the page of the run and reads it."""

    def write(*locations: Path, **options: Any) -> Page:
        write_report(tmp_path / "page.html", *(locations or (reported,)), options=ReportOptions(**options))
        return Page(tmp_path / "page.html")

    return write


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `dsmip report`, which must end with exit code 2 and one line; returns that line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dsmip", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run


def stored(run: Path, model: str = "dsmip", split: str = "test") -> Any:
    return json.loads((run / "evaluate" / split / model / "metrics.json").read_text())


def test_its_numbers_are_those_of_metrics_json(reported: Path, report: Report) -> None:
    page = report()
    metrics = stored(reported)
    models = ("dsmip", "text", "visual", "multimodal")
    expected = [stored(reported, model)["overall"][name] for model in models for name in shown_metrics()]
    assert page.numbers["models"][: len(expected)] == expected
    assert len(page.numbers["models"]) == len(expected) + len(shown_metrics())  # those of the oracle
    of_groups = [
        value[name] for values in metrics["groups"].values() for value in values.values() for name in ("hits@1", "mrr")
    ]
    assert page.numbers["groups"] == of_groups
    low, high = metrics["confidence"]["mrr"]
    assert f"{low:.3f} to {high:.3f}" in page.text
    usage = metrics["experts"]
    for name in ("text", "visual", "multimodal"):
        assert {usage["pair_share"][name], usage["gold_share"][name]} <= {*page.numbers["experts"]}
    right = metrics["calibration"]["right"]
    assert [right["expected_calibration_error"], right["auroc"]] == page.numbers["confidence"][:2]


def test_mentions_have_their_golds_best_entities_and_experts(reported: Path, report: Report) -> None:
    page = report()
    rows = pq.read_table(reported / "evaluate" / "test" / "dsmip" / "ranks.parquet").to_pylist()
    texts = pq.read_table(reported / "evaluate" / "test" / "text" / "ranks.parquet").to_pylist()
    (about,) = page.mentions["runs"]
    assert about["experts"] == ["text", "visual", "multimodal"]
    entity_ids = [entity[0] for entity in page.mentions["entities"]]
    names = {entity[0]: entity[1] for entity in page.mentions["entities"]}
    for shown, row, text in zip(page.mentions["mentions"], rows, texts, strict=True):
        assert (shown["id"], shown["word"], shown["sentence"]) == (row["mention_id"], row["word"], row["sentence"])
        assert (entity_ids[shown["gold"]], names[row["gold"]]) == (row["gold"], row["word"])
        assert shown["groups"]["picture"] == row["picture"]
        assert (shown["image"] >= 0) == row["picture"].startswith("mention")
        assert shown["meanings"] == (2 if row["word"] == "red" else 1)
        (run,) = shown["runs"]
        assert run["rank"] == row["rank"]
        assert [entity_ids[entity] for entity, _, _ in run["top"]] == row["top"][:5]
        assert [about["experts"][expert] for _, _, expert in run["top"]] == row["top_experts"][:5]
        assert about["experts"][run["gold_expert"]] == row["gold_expert"]
        assert (run["own"][0][0], entity_ids[run["own"][0][1]]) == (text["rank"], text["top"][0])
        assert 0 <= run["sure"] <= 1


def test_hostile_texts_are_texts(report: Report) -> None:
    page = report()
    assert HOSTILE in page.text  # the group's name, and the warning of the training
    assert HOSTILE in [entity[1] for entity in page.mentions["entities"]]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    addresses = [values.get(name) for _, values in page.tags for name in ("src", "href") if name in values]
    assert all((address or "").startswith("#") for address in addresses), addresses
    (policy,) = [values["content"] for tag, values in page.tags if tag == "meta" and "http-equiv" in values]
    assert (policy or "").startswith("default-src 'none'; img-src data:;")


def test_what_is_not_evaluated_or_calibrated_has_its_command(reported: Path, report: Report) -> None:
    shutil.rmtree(reported / "evaluate" / "test" / "text")
    shutil.rmtree(reported / "evaluate" / "validation")
    path = reported / "evaluate" / "test" / "dsmip" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["calibration"]
    path.write_text(json.dumps(metrics))
    page = report()
    command = f"dsmip evaluate --run {reported} --split test --model"
    assert f"not evaluated on test: {command} text" in page.text
    assert f"is not known until it is evaluated: {command} text" in page.text
    assert f"not evaluated on test: {command} visual" not in page.text
    assert f"Make it: dsmip calibrate --run {reported} --model dsmip && {command} dsmip" in page.text
    assert "oracle" not in page.text
    assert {"own", "sure"}.isdisjoint(page.mentions["mentions"][0]["runs"][0])


def test_a_calibration_that_is_newer_than_the_figures_draws_no_curve(reported: Path, report: Report) -> None:
    assert "Reliability" in report().text
    path = reported / "evaluate" / "validation" / "dsmip" / "calibration.json"
    before = Calibration.model_validate_json(path.read_text())
    weights = tuple(-weight - 1 for weight in before.right.weights)
    path.write_text(
        before.model_copy(update={"right": before.right.model_copy(update={"weights": weights})}).model_dump_json()
    )
    page = report()
    assert "was calibrated anew after this evaluation" in page.text
    assert "Reliability" not in page.text
    assert page.numbers["confidence"][0] == stored(reported)["calibration"]["right"]["expected_calibration_error"]


def test_ranks_with_few_best_entities(reported: Path, report: Report) -> None:
    for model in ("dsmip", "text", "visual", "multimodal"):
        path = reported / "evaluate" / "test" / model / "ranks.parquet"
        table = pq.read_table(path)
        for name in {"top", "top_scores", "top_experts"} & {*table.column_names}:
            column = [values[:2] for values in table.column(name).to_pylist()]
            number = table.column_names.index(name)
            table = table.set_column(number, name, [column])
        pq.write_table(table, path)
    page = report()
    assert "The ranks hold the 2 best entities of each mention" in page.text
    assert "The curves need the 10 best scores of each mention. Make them: dsmip evaluate" in page.text
    assert all(len(mention["runs"][0]["top"]) == 2 for mention in page.mentions["mentions"])


def test_many_mentions_are_a_sample_and_the_page_says_so(report: Report) -> None:
    page = report(max_mentions=9)
    assert "one of every 3 mentions in the order of the data, 8 of 24" in page.text
    assert [mention["sentence"].rpartition(" ")[2] for mention in page.mentions["mentions"][:2]] == ["48", "51"]


def test_two_models_side_by_side(reported: Path, report: Report) -> None:
    page = report(reported, reported, models=(None, "text"))
    ranks = [
        pq.read_table(reported / "evaluate" / "test" / model / "ranks.parquet").column("rank").to_pylist()
        for model in ("dsmip", "text")
    ]
    only_first = sum(a <= 1 < b for a, b in zip(*ranks, strict=True))
    table = re.search(r"run 1 right</th><td>(\d+)</td><td>(\d+)</td>", page.source)
    assert table
    assert int(table[2]) == only_first
    first, second = (stored(reported, model)["overall"] for model in ("dsmip", "text"))
    assert page.numbers["comparison"][:2] == [first["hits@1"], second["hits@1"]]
    assert [[run["rank"] for run in mention["runs"]] for mention in page.mentions["mentions"]] == [
        list(pair) for pair in zip(*ranks, strict=True)
    ]


@pytest.mark.slow
def test_it_needs_neither_ray_nor_a_model(reported: Path, tmp_path: Path) -> None:
    """The run has no weights, features or index any more."""
    page = tmp_path / "page.html"
    code = (
        "import sys; from ray_jobs import cli\n"
        f"sys.argv = ['dsmip', 'report', {str(reported)!r}, '--html', {str(page)!r}]\n"
        "try: cli.main()\n"
        "finally: print('ray' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True).stdout
    assert said.rstrip().endswith("False")
    assert "24 of 24 mentions" in said
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_what_cannot_be_reported_is_one_line(reported: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "no run at" in refused(tmp_path / "nowhere", "--html", page)
    assert "there is no folder" in refused(reported, "--html", tmp_path / "no" / "page.html")
    assert f"--html {tmp_path} is a folder" in refused(reported, "--html", tmp_path)
    assert "unknown split 'dev'" in refused(reported, "--html", page, "--split", "dev")
    assert "unknown model 'sound'" in refused(reported, "--html", page, "--model", "sound")
    assert "give another RUN2" in refused(reported, reported, "--html", page)
    assert "of which run? give RUN2" in refused(reported, "--html", page, "--model2", "text")
    assert "say where it is by --data" in refused(moved(reported, tmp_path / "gone"), "--html", page)
    assert not page.exists()


def test_runs_of_other_mentions_or_without_an_evaluation_are_refused(
    reported: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other"
    shutil.copytree(reported, other)
    path = other / "evaluate" / "test" / "dsmip" / "ranks.parquet"
    table = pq.read_table(path)
    ids = [f"x{number}" for number in range(len(table))]
    pq.write_table(table.set_column(0, "mention_id", [ids]), path)
    assert "compare runs on the same data" in refused(reported, other, "--html", page)
    assert "evaluate the run again on this data" in refused(other, "--html", page)
    (path.parent / "metrics.json").write_text("{")
    assert "metrics.json is damaged" in refused(other, "--html", page)
    (path.parent / "metrics.json").unlink()
    assert "metrics.json is missing; make it again: dsmip evaluate" in refused(other, "--html", page)
    shutil.rmtree(other / "evaluate")
    assert "has no evaluation of 'dsmip' on test; make it: dsmip evaluate" in refused(other, "--html", page)
    assert "has no evaluation of 'dsmip' on test" in refused(reported, other, "--html", page)
    assert not page.exists()


def moved(run: Path, data: Path) -> Path:
    """The run, which remembers its data elsewhere."""
    path = run / "run.json"
    stamp = json.loads(path.read_text())
    stamp["data"]["folder"] = str(data)
    path.write_text(json.dumps(stamp))
    return run


def test_thumbnails_have_a_bound(reported: Path) -> None:
    run, dataset = read_evaluated_run(reported, "test", None), Run.open(reported).dataset
    whole = shown_mentions([run], [None], dataset, no_progress)
    assert whole.images_left_out == 0
    room = sum(map(len, whole.data["images"])) // 2
    part = shown_mentions([run], [None], dataset, no_progress, max_image_bytes=room)
    assert sum(map(len, part.data["images"])) <= room
    assert part.images_left_out > 0
    assert {entity[3] for entity in part.data["entities"]} >= {-2}


def test_two_that_were_not_evaluated_alike_need_across(reported: Path, report: Report, tmp_path: Path) -> None:
    other = shutil.copytree(reported, tmp_path / "other")
    path = other / "evaluate" / "test" / "dsmip" / "ranks.parquet"
    table = pq.read_table(path)
    metadata = {key: value.replace(b'"entities":12', b'"entities":13') for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(UserError, match="were not evaluated alike"):
        report(reported, other)
    source = report(reported, other, across=True).source
    assert "run 1 right" in source
    assert "Not evaluated alike:</strong> entities (12 and 13)" in source


@pytest.mark.slow
def test_a_run_in_an_object_store(reported: Path, bucket: str, tmp_path: Path) -> None:
    there = open_run_storage(f"{bucket}/run")
    for path in sorted(reported.rglob("*")):
        if path.is_file():
            with there.atomic(path.relative_to(reported).as_posix()) as temporary:
                shutil.copyfile(path, temporary)
    shutil.rmtree(there.folder)
    write_report(tmp_path / "there.html", f"{bucket}/run")
    write_report(tmp_path / "here.html", reported)
    found, expected = Page(tmp_path / "there.html"), Page(tmp_path / "here.html")
    assert found.numbers == expected.numbers
    assert found.mentions["mentions"] == expected.mentions["mentions"]
    assert f"{bucket}/run" in found.text
