"""What findings mean and what to do about them, and how page and terminal show them: sorted, folded, escaped."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.inspection.batches import SameGold
from data_prep.inspection.checks import Count, Row
from data_prep.inspection.findings import VERDICTS, Finding, Verdict, findings_of, touched, verdict
from data_prep.inspection.meanings import OF_ENTITIES, OF_MENTIONS, OF_REASONS, Kind, Meaning, meaning_of
from data_prep.inspection.presentation.page import write_page
from data_prep.inspection.presentation.tables import figure_tables
from data_prep.inspection.report import Inspection
from dsmip.data.dataset import Dataset
from ray_jobs.local_jobs.inspect_data import inspect_data
from tests.support.paths import ROOT

NO_PAIRS = SameGold(128, 4, 0.0, 0, 0, 0.0)
MARKUP = "<b onclick='x'>&\"</b>"


@pytest.fixture(scope="module")
def page(found: Inspection, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(found, tmp_path_factory.mktemp("page"))


def written(found: Inspection, folder: Path) -> str:
    write_page(found, folder / "page.html")
    return (folder / "page.html").read_text()


def row(name: str, kind: Kind, counts: Mapping[str, tuple[int, int]]) -> Row:
    meaning = Meaning(kind, f"{name} means", f"{name} remedy")
    return Row(name, f"label of {name}", meaning, {part: Count(*each) for part, each in counts.items()})


def names(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.name for finding in findings]


@pytest.mark.parametrize("meanings", [OF_MENTIONS, OF_ENTITIES], ids=["mentions", "entities"])
def test_every_check_has_a_meaning_and_a_remedy_and_every_text_a_check(
    meanings: Mapping[str, Meaning], found: Inspection
) -> None:
    rows = found.mentions if meanings is OF_MENTIONS else found.entities
    assert {each.name for each in rows} == meanings.keys()
    for each in rows:
        assert len(each.meaning.means) > 10, each.name
        assert each.meaning.remedy, each.name


def test_every_reason_of_preparation_has_both_and_those_with_words_of_their_own_are_documented() -> None:
    documented = (ROOT / "docs" / "data.md").read_text()
    assert [reason for reason in OF_REASONS if reason not in documented] == []
    for action in ("rejected", "repaired", "degraded"):
        meaning = meaning_of("whatever a layout says", action)
        assert meaning.means
        assert meaning.remedy


@pytest.mark.parametrize(
    ("kind", "share", "expected"),
    [
        ("leak", 0.05, "serious"),
        ("leak", 0.049, "look at it"),
        ("flaw", 0.099, "look at it"),
        ("flaw", 0.1, "serious"),
        ("flaw", 0.0099, "negligible"),
        ("property", 1.0, None),
    ],
)
def test_verdicts_go_by_kind_and_share(kind: Kind, share: float, expected: Verdict | None) -> None:
    assert verdict(kind, share) == expected


def test_leaks_come_first_and_the_worst_of_each_kind() -> None:
    rows = [
        row("large_property", "property", {"test": (9, 10)}),
        row("small_flaw", "flaw", {"test": (2, 1000)}),
        row("small_leak", "leak", {"test": (2, 1000)}),
        row("serious_flaw", "flaw", {"train": (1, 1000), "test": (5, 10)}),
        row("notable_leak", "leak", {"test": (2, 100)}),
        row("nothing", "leak", {"test": (0, 100)}),
    ]
    found = findings_of(rows, [row("kb_check", "flaw", {"kb": (3, 10)})], NO_PAIRS)
    assert names(found) == [
        "notable_leak",
        "small_leak",
        "serious_flaw",
        "kb_kb_check",
        "small_flaw",
        "large_property",
    ]
    assert [each.verdict for each in found[2].counts] == ["negligible", "serious"]
    assert all(finding.verdict in VERDICTS for finding in found[:5])


def test_what_two_splits_share_is_told_of_the_later_one_and_exact_copies_once() -> None:
    shared = {"train": (4, 10), "validation": (1, 10), "test": (2, 10)}
    rows = [
        row("picture_exact_in_validation", "leak", shared),
        row("picture_near_in_validation", "leak", shared | {"test": (3, 10)}),
        row("picture_exact_in_train", "leak", shared | {"train": (0, 0)}),
        row("picture_near_in_train", "leak", shared | {"train": (0, 0)}),
    ]
    found = findings_of(rows, [], NO_PAIRS)
    counts = {finding.name: {each.name: each.count.count for each in finding.counts} for finding in found}
    assert counts["picture_exact_in_train"] == {"validation": 1, "test": 2}
    assert "picture_near_in_train" not in counts
    assert counts["picture_near_in_validation"]["test"] == 3
    assert "train" not in counts["picture_near_in_validation"]


def test_same_gold_pairs_are_said_in_words_and_figures_and_are_no_fault() -> None:
    (finding,) = findings_of([], [], SameGold(128, 4, 12.4, 23, 4, 12.93))
    assert finding.meaning.means.startswith("100.0 % of the batches hold mentions of the same gold, 12.40 pairs")
    assert "(12.93)" in finding.meaning.remedy
    assert finding.verdict is None


def test_what_was_lost_in_preparation_comes_first() -> None:
    rows = touched({"repaired": {"wrong span": 9}, "degraded": {"empty sentence": 1}, "rejected": {"a": 2, "b": 3}})
    assert [reason for _, reason, _, _ in rows] == ["b", "a", "empty sentence", "wrong span"]


def test_the_page_tells_leaks_flaws_and_properties_apart_with_both_columns(page: str, found: Inspection) -> None:
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    for kind, section in (("leak", "leaks"), ("flaw", "flaws"), ("property", "properties")):
        expected = [finding.name for finding in found.findings if finding.meaning.kind == kind]
        assert expected
        assert re.findall(r'<tr id="finding-(\w+)">', sections[section]) == expected
    cells = re.findall(r'<td data-head="What (?:it means|to do)">(.*?)</td>', page)
    assert len(cells) >= 2 * len(found.findings)
    assert all(cells)
    judged = [each for finding in found.findings for each in finding.counts if each.verdict]
    for section in ("leaks", "flaws"):
        assert sections[section].count('class="share-') == sections[section].count('class="badge') > 0
    assert page.count('class="share-') == len(judged)
    assert "badge" not in sections["properties"]


def test_every_line_of_the_contents_leads_somewhere(page: str) -> None:
    (contents,) = re.findall(r"<nav.*?</nav>", page, re.DOTALL)
    assert {"#leaks", "#flaws", "#properties", "#prepared", "#figures", "#samples", "#examples"} <= set(
        re.findall(r'href="(.*?)"', contents)
    )
    assert [link for link in re.findall(r'href="#(.*?)"', page) if page.count(f'id="{link}"') != 1] == []


def test_rows_without_a_hit_are_folded_and_the_others_sorted(page: str, found: Inspection) -> None:
    mentions, entities, *_ = figure_tables(found)
    assert "picture cannot be decoded" in mentions.folded
    assert "a picture cannot be decoded" in entities.folded
    assert not {cells[0] for cells in mentions.rows} & set(mentions.folded)
    shares = {each.label: max(count.share or 0.0 for count in each.counts.values()) for each in found.mentions}
    shown = [shares[cells[0]] for cells in mentions.rows if cells[0] in shares]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) + len(mentions.folded) == len(found.mentions)
    folded = "".join(re.findall(r"<details>.*?</details>", page, re.DOTALL))
    assert "<li>picture cannot be decoded</li>" in folded


def test_all_that_comes_from_the_data_is_escaped(found: Inspection, tmp_path: Path) -> None:
    hostile = replace(
        found,
        name=MARKUP,
        licence=MARKUP,
        prepared={"degraded": {MARKUP: 3}, "rejected": {}, "repaired": {}},
        examples=tuple(replace(example, split=MARKUP) for example in found.examples),
    )
    page = written(hostile, tmp_path)
    assert "<b onclick" not in page
    assert page.count("&lt;b onclick=&#39;x&#39;&gt;&amp;&#34;&lt;/b&gt;") > 4
    assert not re.search(r"<(script|link|iframe)\b|https?:|url\(|@import", page)


def test_the_page_is_as_wide_as_the_window(page: str) -> None:
    assert 'name="viewport"' in page
    assert not re.search(r"\bbody\b[^}]*max-width", page)
    assert "@media (max-width" in page


def test_the_terminal_says_the_same_words(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_data(str(data.folder), html=None, json_file=None, images=False, workers=1)
    shown = " ".join(capsys.readouterr().out.split())
    told = [finding for finding in found.findings if finding.verdict in {"serious", "look at it"}]
    assert {finding.meaning.kind for finding in told} == {"leak", "flaw"}
    for finding in told:
        assert finding.label in shown
        assert finding.meaning.means in shown
        assert finding.meaning.remedy in shown
    assert "100.0 % of the batches hold mentions of the same gold" in shown
    assert "found nothing:" in shown
