"""Mentions that score NaN: each has a reason and the others are linked, but a model that scores nothing is an error."""

import re
from typing import Any

import pytest

import dsmip
from dsmip.linking.bulk import BulkOptions, MentionBlock, link_block
from dsmip.linking.linker import Linker
from dsmip.runs.run import Run
from tests.support.scoring.linked_runs import break_long_texts

GOOD = [{"word": word, "sentence": f"a {word} thing"} for word in ("red", "green", "blue")]
BROKEN = {"word": "grey", "sentence": "a grey thing " * 10}
REASON = "mention: the model scores it as NaN or infinite"


@pytest.fixture(scope="module")
def linker(run: Run) -> Linker:
    return dsmip.load(run.folder, model="text")


@pytest.mark.parametrize("options", [{}, {"candidates": 4}, {"explain": True}, {"batch_size": 2}])
def test_the_others_are_linked(linker: Linker, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    expected = list(linker.link_many(GOOD, **options))
    break_long_texts(monkeypatch, 20)
    given = [GOOD[0], BROKEN, GOOD[1], {"word": " "}, BROKEN, GOOD[2], BROKEN]
    found = list(linker.link_many(given, on_error="report", **options))
    assert [links.mention.word for links in found] == ["red", "grey", "green", " ", "grey", "blue", "grey"]
    assert [links.reason is None for links in found] == [True, False, True, False, False, True, False]
    for links in (found[1], found[4], found[6]):
        assert re.match(REASON, links.reason or "")
        assert len(links) == 0
    for links, same in zip((found[0], found[2], found[5]), expected, strict=True):
        assert [link.entity_id for link in links] == [link.entity_id for link in same]
        assert [link.score for link in links] == pytest.approx([link.score for link in same], abs=1e-5)
        assert links.parts.keys() == same.parts.keys()


@pytest.mark.parametrize("candidates", [None, 4])
def test_it_is_an_error_where_nothing_is_reported(
    linker: Linker, monkeypatch: pytest.MonkeyPatch, candidates: int | None
) -> None:
    break_long_texts(monkeypatch, 20)
    with pytest.raises(dsmip.UserError, match=r"text of .* scores 'grey' and entity Q\d+ as NaN or infinite"):
        list(linker.link_many([GOOD[0], BROKEN], candidates=candidates))
    with pytest.raises(dsmip.UserError, match="scores 'grey'"):
        linker.link(BROKEN["word"], BROKEN["sentence"], candidates=candidates)


def test_a_file_of_links_has_a_row_of_a_mention_alone(linker: Linker, monkeypatch: pytest.MonkeyPatch) -> None:
    break_long_texts(monkeypatch, 20)
    table = link_block(linker, MentionBlock("mentions.jsonl", 512, [BROKEN]), BulkOptions())
    (row,) = table.to_pylist()
    assert (row["row"], row["word"], row["entity_ids"]) == (512, "grey", [])
    assert re.match(REASON, row["reason"])


@pytest.mark.parametrize("given", [GOOD, GOOD[:1], [BROKEN, *GOOD]])
def test_a_model_that_scores_nothing_is_an_error(
    linker: Linker, monkeypatch: pytest.MonkeyPatch, given: list[dict[str, str]]
) -> None:
    break_long_texts(monkeypatch, 0)
    with pytest.raises(dsmip.UserError, match=f"scores '{given[0]['word']}' and entity"):
        list(linker.link_many(given, on_error="report"))
