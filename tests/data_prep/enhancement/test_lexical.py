"""Candidates by name, BM25 against its slow twin, and what tables of descriptions may look like."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.enhancement.bm25 import Bm25
from data_prep.enhancement.candidates import NameIndex
from data_prep.enhancement.choosers import Question, lexical
from data_prep.enhancement.descriptions import Description, of_file, words_of
from dsmip.errors import UserError

TEXTS = st.lists(st.sampled_from("abcde"), max_size=6)


def plain_score(query: Sequence[str], document: Sequence[str], documents: Sequence[Sequence[str]]) -> float:
    """BM25 word by word, from all documents."""
    mean = sum(map(len, documents)) / len(documents)
    score = 0.0
    for word in sorted(set(query)):
        having = len([other for other in documents if word in other])
        idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        times = document.count(word) if isinstance(document, list) else 0
        if times:
            score += idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(document) / mean))
    return score


@given(st.lists(TEXTS, min_size=1, max_size=6), TEXTS)
def test_bm25_is_its_slow_twin(documents: list[list[str]], query: list[str]) -> None:
    bm25 = Bm25(set(query))
    for document in documents:
        bm25.add(document)
    for document in documents:
        assert bm25.score(query, document) == pytest.approx(plain_score(query, document, documents), abs=1e-9)


def names(index: NameIndex, word: str) -> list[tuple[str, bool]]:
    return [(each.description.name, each.exact) for each in index.of(word)]


def test_candidates_bear_the_words_name() -> None:
    index = NameIndex(["ELM", "Elm Street", "elm", "!?", "bush"], limit=3)
    for name, aliases in (
        ("The old Elm Street", ()),
        ("elms", ()),
        ("Elm  street", ()),
        ("Ulmus", ("elm",)),
        ("Elm", ()),
        ("George W. Bush", ()),
    ):
        index.add(Description(name, f"text of {name}", aliases))
    assert names(index, "Elm") == [("Ulmus", True), ("Elm", True), ("Elm  street", False)]
    assert names(index, "elm street") == [("Elm  street", True), ("The old Elm Street", False)]
    assert names(index, "Bush") == [("George W. Bush", False)]
    assert names(index, "!?") == []
    assert names(index, "never asked") == []


def test_the_best_names_stay_whatever_the_order_of_the_table() -> None:
    described = [Description(f"elm {'x ' * length}", str(length)) for length in range(8)]
    for order in (described, described[::-1]):
        index = NameIndex(["elm"], limit=2)
        for each in order:
            index.add(each)
        assert [each.description.text for each in index.of("elm")] == ["0", "1"]


def test_the_sentence_decides_and_equals_go_to_the_best_name() -> None:
    index, bm25 = NameIndex(["elm"], limit=5), Bm25(words_of("the elm lost its leaves on a street"))
    for name, text in (("Elm", "a tree with leaves"), ("Elm", "a street in a town"), ("Elm Park", "a station")):
        index.add(Description(name, text))
        bm25.add(words_of(text))
    sentences = ["The elm lost its leaves.", "Down the STREET", "nothing of it", ""]
    questions = [Question(str(n), "elm", sentence, index.of("elm")) for n, sentence in enumerate(sentences)]
    assert list(lexical(bm25)([*questions, Question("4", "ash", "leaves", [])])) == [0, 1, 0, 0, None]


def test_tables_are_read_in_both_forms(tmp_path: Path) -> None:
    dump = {
        "id": "Q1",
        "labels": {"en": {"value": "Elm"}, "de": {"value": "Ulme"}},
        "descriptions": {"en": {"value": "genus of trees"}, "de": {"value": "Gattung"}},
        "aliases": {"de": [{"value": "Rüster"}]},
    }
    plain = [{"label": "Oak", "description": " tree "}, {"name": "Ash", "desc": "tree", "aliases": ["Fraxinus", 3]}]
    incomplete = [{"label": "Elm"}, {"labels": {}, "descriptions": {}}, {"label": 3, "description": "x"}]
    lines = ["[", *(json.dumps(each) + "," for each in (dump, *plain, *incomplete)), "]"]
    path = tmp_path / "dump.json.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    german = Description("Ulme", "Gattung", ("Rüster",))
    others = [Description("Oak", "tree"), Description("Ash", "tree", ("Fraxinus",))]
    assert list(of_file(path, "de")) == [german, *others]
    assert next(of_file(path, "en")) == Description("Elm", "genus of trees")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"label": "a", "description": "b"}\n{"label": "a", "desc', "line 2: .*wrong JSON"),
        (b'{"label": "a", "description": "b"}\n3\n', "line 2: expected an object such as"),
        (b'{"label": "a"}\n', "no line has a label and a description; expected lines such as"),
        (b"\xff\n", "line 1: .*not UTF-8"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "table.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(of_file(tmp_path / "table.jsonl", "en"))
    packed = bytearray(gzip.compress(content))
    packed[10] = 0xFF  # the first block's kind is none
    for damaged in (content, packed):
        (tmp_path / "table.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"descriptions .* cannot be read"):
            list(of_file(tmp_path / "table.gz", "en"))
