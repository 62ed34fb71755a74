"""WikiDiverse in both forms: spans of both conventions, pictures by MD5, golds by address."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build.rules import checked_mentions
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, RawMention, ReleaseOptions
from data_prep.formats.wikidiverse import WikidiverseRelease, image_names, span_fault, wiki_title
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError

WIKI, UPLOAD = "https://en.wikipedia.org/wiki/", "https://upload.wikimedia.org/wikipedia/commons"
KB = [
    {"qid": "Q1", "entity_name": "Detroit Lions", "attr": "team"},
    {"qid": "Q2", "entity_name": "Packers", "attr": "team", "wiki_url": f"{WIKI}Green_Bay_Packers"},
    {"qid": "Zürich", "entity_name": "a city", "attr": "id is a title"},
    {"qid": "Q4", "entity_name": "Mercury", "attr": "a planet"},
    {"qid": "Q5", "entity_name": "Mercury", "attr": "an element"},
    {"qid": "Q6", "entity_name": "Nil", "attr": "a page that no nil means"},
]
LIONS = "The Lions versus the Packers (2007)."
TRAIN: list[Any] = [
    [
        LIONS,
        f"{UPLOAD}/0/06/Running%20Play-2007.jpg",
        "sports",
        [
            ["Lions", "Organization", 4, 9, f"{WIKI}Detroit_Lions"],
            ["Packers", "Organization", 21, 27, f"n{WIKI}Green%5FBay_Packers?action=raw#x"],
            ["Lions", "Organization", 5, 9, f"{WIKI}detroit_Lions"],
            ["Lion", "Organization", 0, 3, "Q1"],
            ["the", "Other", 0, 2, "Z%C3%BCrich"],
            ["Cubs", "Other", 0, 2, f"{WIKI}Z%C3%BCrich"],
        ],
    ],
    ["A planet", f"{UPLOAD}/a/ab/Map.svg", "", [["planet", None, 2, 8, "Mercury"], ["A", "Other", 0, 0, "NIL"]]],
    ["Broken", None, "news", [["Broken", "Other", 0, 6, ["x"]], ["Broken", 0, 6], [" ", "Other", 0, 1, "Q1"]]],
    ["Nothing", None, "news", []],
    ["Short", None, "news"],
    {"sentence": "no list"},
]
IMAGES = {"Running%20Play-2007.jpg": ".jpg", "Map.svg": ".png"}


def _md5(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


def _write(folder: Path, train: list[Any], other: list[Any], suffix: str = ".json") -> Path:
    (folder / "wikinewsImgs").mkdir(parents=True)
    for name, extension in IMAGES.items():
        (folder / "wikinewsImgs" / (_md5(name) + extension)).write_bytes(b"x")
    for name, records in {"train": train, "valid": other, "test": other}.items():
        (folder / (name + suffix)).write_text(json.dumps(records))
    (folder / "kb_entity.json").write_text(json.dumps(KB))
    return folder


def _flat(passages: list[Any]) -> list[Any]:
    """The same in the mention-level form, as far as that can hold it."""
    return [
        [sentence, image, word, kind, ["l"], [" "], gold, ["c"], topic, start, end]
        for sentence, image, topic, mentions in passages
        for word, kind, start, end, gold in mentions
    ]


def _read(release: WikidiverseRelease, split: str) -> tuple[list[RawMention], list[Finding]]:
    findings: list[Finding] = []
    rows = {entity["qid"]: row for row, entity in enumerate(KB)}
    return list(checked_mentions(release.mentions(split), rows, findings.append)), findings


def test_passages(tmp_path: Path) -> None:
    release = open_release(_write(tmp_path / "release", TRAIN, TRAIN[:1]), None, ReleaseOptions())
    assert isinstance(release, WikidiverseRelease)
    assert release.choices["form"] == "passages"
    mentions, findings = _read(release, "train")
    sports = {"topic": "sports", "type": "Organization"}
    assert [(m.mention_id, m.word, m.sentence, m.gold, dict(m.groups)) for m in mentions] == [
        ("train-0-0", "Lions", LIONS, "Q1", sports),
        ("train-0-1", "Packers", LIONS, "Q2", sports),
        ("train-0-2", "Lions", LIONS, "Q1", sports),
        ("train-0-3", "Lion", LIONS, "Q1", sports),
        ("train-0-4", "the", LIONS, "Zürich", {"topic": "sports", "type": "Other"}),
        ("train-0-5", "Cubs", LIONS, "Zürich", {"topic": "sports", "type": "Other"}),
    ]
    images = [mention.image and mention.image.path for mention in mentions]
    assert all(path and path.suffix == ".jpg" for path in images)
    assert [(finding.record, finding.reason, finding.action, finding.detail) for finding in findings] == [
        (0, "wrong span", "repaired", "train-0-2"),
        (0, "wrong span", "repaired", "train-0-3"),
        (0, "wrong span", "repaired", "train-0-4"),
        (0, "wrong span", "degraded", "train-0-5"),
        (1, "unknown gold", "rejected", "Mercury"),  # two entities have the name
        (1, "nil gold", "rejected", findings[5].detail),
        (2, "wrong type", "rejected", "mention 0: address is list"),
        (2, "wrong type", "rejected", "mention 1: record is no list of 5"),
        (2, "empty word", "rejected", findings[8].detail),
        (3, "no mentions", "rejected", ""),
        (4, "wrong type", "rejected", "record is no list of 4"),
        (5, "wrong type", "rejected", "record is no list of 4"),
    ]
    assert [name for name, _ in release.files()] == [
        *("train.json", "valid.json", "test.json"),
        *sorted(f"wikinewsImgs/{_md5(name)}{extension}" for name, extension in IMAGES.items()),
        "kb/kb_entity.json",
    ]


def test_the_form_with_candidates_reads_the_same(tmp_path: Path) -> None:
    passages = WikidiverseRelease(_write(tmp_path / "passages", TRAIN[:2], TRAIN[:1]))
    folder = _write(tmp_path / "flat", _flat(TRAIN[:2]), _flat(TRAIN[:1]), "_w_10cands.json")
    flat = open_release(folder, None, ReleaseOptions())
    assert isinstance(flat, WikidiverseRelease)
    assert flat.choices["form"] == "mentions"
    for split in SPLITS:
        texts = [
            [(m.word, m.sentence, m.gold, m.groups, m.image and m.image.name) for m in _read(release, split)[0]]
            for release in (passages, flat)
        ]
        assert texts[0] == texts[1]
        assert texts[0]
    (folder / "train_w_10cands.json").write_text(json.dumps([[1] * 11, [1], *_flat(TRAIN[:1])]))
    mentions, findings = _read(WikidiverseRelease(folder), "train")
    assert [mention.mention_id for mention in mentions][:2] == ["train-2", "train-3"]
    assert [finding.detail for finding in findings[:2]] == ["mention is int", "record is no list of 11"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"{UPLOAD}/0/06/Photo-2007.jpg", [_md5("Photo-2007.jpg") + ".jpg", "Photo-2007.jpg"]),
        (f"{UPLOAD}/a/ab/Map.svg", [_md5("Map.svg") + ".png", "Map.svg"]),
        (f"{UPLOAD}/a/ab/Map.SVG", [_md5("Map.SVG") + ".png"]),
        (f"{UPLOAD}/a/ab/A.b.JPEG", [_md5("A.b.JPEG") + ".JPEG"]),
        (f"{UPLOAD}/a/ab/Z%C3%BCrich.png", [_md5("Z%C3%BCrich.png") + ".png", "Z%C3%BCrich.png"]),
        (f"{UPLOAD}/a/ab/Play.gif", [_md5("Play.gif") + "Play.gif", _md5("Play.gif") + ".gif"]),
        ("plain", [_md5("plain") + "plain", "plain"]),
    ],
)
def test_names_of_pictures(url: str, expected: list[str]) -> None:
    found = image_names(url)
    assert found[0] == expected[0]
    assert set(expected) <= set(found)


@pytest.mark.parametrize(
    ("reference", "title"),
    [
        (f"{WIKI}Green_Bay_Packers", "Green Bay Packers"),
        ("nhttps://en.wikipedia.org/wiki/Z%C3%BCrich#History", "Zürich"),
        ("https://en.m.wikipedia.org/wiki/eBay?oldid=3", "EBay"),
        (f"{WIKI}What%3F", "What?"),
        ("https://www.wikidata.org/wiki/Q42", "Q42"),
        ("  Who is who? ", "Who is who?"),
        (f"{WIKI}AC/DC", "AC/DC"),
        ("", ""),
    ],
)
def test_titles_of_references(reference: str, title: str) -> None:
    assert wiki_title(reference) == title


@pytest.mark.parametrize(
    ("start", "end", "word", "expected"),
    [
        (4, 9, "Lions", None),
        (4, 8, "Lions", None),
        (3, 9, "Lions ", None),
        (4, 7, "Lions", "repaired"),
        (-5, 9, "Lions", "repaired"),
        (True, 9, "Lions", "repaired"),
        ("4", None, "Lions", "repaired"),
        (0, 2, "s", "degraded"),
        (0, 4, "Cubs", "degraded"),
    ],
)
def test_a_span_fits_either_way_or_is_noted(start: object, end: object, word: str, expected: str | None) -> None:
    assert span_fault(LIONS, word, start, end) == expected


@given(st.text("ab ", max_size=8), st.text("ab", min_size=1, max_size=3), st.integers(-2, 9), st.integers(-2, 9))
def test_spans_as_letter_by_letter(sentence: str, word: str, start: int, end: int) -> None:
    starts = [n for n in range(len(sentence)) if sentence[n : n + len(word)] == word]
    fits = False
    for stop in (end, end + 1):
        letters = [letter for offset, letter in enumerate(sentence) if 0 <= start <= offset < stop]
        fits |= start <= end and "".join(letters).strip() == word
    assert span_fault(sentence, word, start, end) == (None if fits else "repaired" if len(starts) == 1 else "degraded")


def test_addresses_are_found_in_every_kind_of_knowledge_base(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", TRAIN[:1], TRAIN[:1])
    expected = [mention.gold for mention in _read(WikidiverseRelease(folder), "train")[0]]
    (folder / "kb_entity.json").unlink()
    lines = [
        {"entity_id": "Q1", "name": "a team", "attributes": "", "title": "Detroit Lions"},
        {"entity_id": "Q2", "name": "a team", "attributes": "", "url": f"{WIKI}Green_Bay_Packers"},
        {"entity_id": "Zürich", "name": "Detroit Lions", "attributes": "the name comes after the field title"},
    ]
    for kb in ("entities.jsonl", "entities.parquet"):
        if kb.endswith("jsonl"):
            (tmp_path / kb).write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            pq.write_table(pa.Table.from_pylist([{"url": None, "title": None} | line for line in lines]), tmp_path / kb)
        release = WikidiverseRelease(folder, ReleaseOptions(kb=tmp_path / kb))
        mentions, findings = _read(release, "train")
        assert [mention.gold for mention in mentions] == expected
        assert {finding.reason for finding in findings} == {"wrong span"}
        with pytest.raises(UserError, match="leave --entity-text out"):
            WikidiverseRelease(folder, ReleaseOptions(kb=tmp_path / kb, entity_text="desc"))


def test_what_the_layout_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", TRAIN, TRAIN[:1])
    with pytest.raises(UserError, match="--split"):
        WikidiverseRelease(folder, ReleaseOptions(split=(70, 10, 20)))
    (folder / "kb_entity.json").unlink()
    with pytest.raises(UserError, match=r"has no knowledge base .* --kb"):
        WikidiverseRelease(folder)
    (folder / "valid.json").unlink()
    with pytest.raises(UserError, match=r"looked for train.json, valid.json, test.json or train_w_10cands.json"):
        WikidiverseRelease(folder)
