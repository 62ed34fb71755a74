"""The layout for one's own data: JSON lines and parquet say the same, and mistakes are named."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build.rules import MAX_GROUPS, UniqueIds, checked_entities, checked_mentions
from data_prep.formats.jsonl import JsonlKb, JsonlRelease
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, RawEntity, RawMention, ReleaseOptions
from dsmip.errors import UserError
from tests.support.paths import ROOT
from tests.support.small_release import image_bytes

ENTITIES: list[dict[str, Any]] = [
    {
        "entity_id": 7,
        "name": "Oak",
        "attributes": {"kind": "tree.", "parts": ["leaf", "root"], "height": 30, "note": ""},
    },
    {
        "entity_id": 8,
        "name": "Elm",
        "attributes": {"kind": "tree", "note": None},
        "images": ["images/elm.jpg", "up/../x"],
    },
    {"entity_id": 9, "name": "Ash", "attributes": None, "images": ["images/none.jpg"]},
]
MENTIONS: list[dict[str, Any]] = [
    {
        "mention_id": "a",
        "word": "oak",
        "sentence": "An oak.",
        "entity_id": 7,
        "split": "train",
        "topic": "wood",
        "n": 1.5,
    },
    {"mention_id": "b", "word": "elm", "sentence": "Elm!", "entity_id": 8, "image": "images/elm.jpg", "split": "dev"},
    {"mention_id": "a", "word": "elm", "sentence": "Two.", "entity_id": 8, "image": "/etc/hostname", "split": " Test "},
    {"mention_id": "c", "word": "fir", "sentence": "None.", "entity_id": None, "split": "valid"},
    {"mention_id": "d", "word": "oak", "sentence": "Lost.", "entity_id": 7, "split": "extra"},
]


def write_release(folder: Path, form: str) -> Path:
    """The records above as .jsonl or .parquet, and one picture."""
    (folder / "images").mkdir(parents=True)
    (folder / "images/elm.jpg").write_bytes(image_bytes((8, 8)))
    for name, records in (("entities", ENTITIES), ("mentions", MENTIONS)):
        path = folder / f"{name}.{form}"
        if form == "jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        else:
            pq.write_table(pa.Table.from_pylist(_same_columns(records)), path, row_group_size=2)
    return folder


def _same_columns(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return [dict.fromkeys(names) | record for record in records]


def _read(release: JsonlRelease) -> tuple[list[RawEntity], dict[str, list[RawMention]], list[Finding]]:
    findings: list[Finding] = []
    entities = list(checked_entities(release.entities(), findings.append))
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    ids = UniqueIds()
    mentions = {
        split: list(checked_mentions(release.mentions(split), rows, findings.append, ids))
        for split in ("train", "validation", "test")
    }
    return entities, mentions, findings


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_records_of_either_form(form: str, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", form)
    release = open_release(folder, None, ReleaseOptions())
    assert isinstance(release, JsonlRelease)
    entities, mentions, findings = _read(release)
    assert [(each.entity_id, each.name, each.attributes) for each in entities] == [
        ("7", "Oak", "kind: tree. parts: leaf, root. height: 30."),
        ("8", "Elm", "kind: tree."),
        ("9", "Ash", ""),
    ]
    assert [[image.path for image in each.images] for each in entities] == [
        [],
        [folder / "images/elm.jpg"],
        [None],
    ]
    assert {split: [each.mention_id for each in items] for split, items in mentions.items()} == {
        "train": ["a"],
        "validation": ["b"],
        "test": ["a-2"],
    }
    assert mentions["train"][0].groups == {"n": "1.5", "topic": "wood"}
    assert mentions["validation"][0].image == entities[1].images[0]
    assert mentions["test"][0].image is None
    assert sorted((each.source, each.record, each.reason, each.detail) for each in findings) == [
        (f"entities.{form}", 1, "picture outside the folder", "up/../x"),
        (f"entities.{form}", 2, "empty attributes", "9"),
        (f"mentions.{form}", 2, "duplicate mention id", "a -> a-2"),
        (f"mentions.{form}", 2, "picture outside the folder", "/etc/hostname"),
        (f"mentions.{form}", 3, "null gold", ""),
        (f"mentions.{form}", 4, "unknown split", "extra"),
    ]
    names = [f"entities.{form}", "images/elm.jpg", f"mentions.{form}"]
    assert release.files() == [(name, folder / name) for name in names]
    kb = JsonlKb(folder / f"entities.{form}")
    assert kb.files() == [(name, folder / name) for name in names[:2]]
    assert [(key, record["name"]) for key, record in kb.records()] == [("7", "Oak"), ("8", "Elm"), ("9", "Ash")]


def test_long_and_many_things_are_bounded(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    mib = "x" * (1 << 20)
    entity = {"entity_id": "e", "name": mib, "attributes": {mib: mib}, "images": [mib]}
    mention = {"word": mib, "sentence": mib, "entity_id": "e", "image": mib, "split": "train"}
    groups = {f"g{number:03d}": "v" for number in range(MAX_GROUPS + 2)} | {mib: "v", "long": mib}
    records = [mention | {"mention_id": mib} | groups, mention | {"entity_id": mib}, mention | {"split": mib}]
    (folder / "entities.jsonl").write_text(json.dumps(entity))
    (folder / "mentions.jsonl").write_text("\n".join(map(json.dumps, records)))
    entities, mentions, findings = _read(JsonlRelease(folder))
    assert [len(text) for text in (entities[0].name, entities[0].attributes)] == [1 << 16] * 2
    (kept,) = mentions["train"]
    assert (kept.mention_id, len(kept.word), len(kept.sentence)) == ("mentions-0", 1 << 16, 1 << 16)
    assert len(kept.groups) == MAX_GROUPS
    reasons = [(each.source.split(".")[0], each.record, each.reason) for each in findings]
    assert sorted(reasons) == [
        ("entities", 0, "text too long"),
        ("mentions", 0, "text too long"),
        ("mentions", 0, "unusable groups"),
        ("mentions", 0, "unusable mention id"),
        ("mentions", 1, "unknown gold"),
        ("mentions", 2, "unknown split"),
    ]
    assert max(len(each.detail) for each in findings) == 200


def test_mistakes_with_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looked for entities.jsonl or entities.parquet: neither is there"):
        JsonlRelease(tmp_path)
    folder = write_release(tmp_path / "mine", "jsonl")
    write_release(tmp_path / "other", "parquet")
    with pytest.raises(UserError, match=r"--kb: the layout jsonl has no such choice"):
        JsonlRelease(folder, ReleaseOptions(kb=tmp_path))
    (folder / "mentions.jsonl").unlink()
    (folder / "mentions.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"mentions.parquet: cannot be read as parquet"):
        list(JsonlRelease(folder).mentions("train"))
    (tmp_path / "other/entities.parquet").rename(folder / "entities.parquet")
    with pytest.raises(UserError, match=r"entities.jsonl or entities.parquet: both are there; keep one"):
        JsonlRelease(folder)


def test_nested_attributes_are_no_text(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    wrong = [{"entity_id": "x", "name": "x", "attributes": value} for value in ({"a": {}}, {"a": [[1]]}, ["a"], 3)]
    (folder / "entities.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    entities, _, findings = _read(JsonlRelease(folder))
    shown = [(each.reason, each.action, each.id) for each in findings if each.record == 0 and each.source[0] == "e"]
    assert shown == [("wrong type", "degraded", "x"), ("empty attributes", "degraded", "x")]
    assert [each.attributes for each in entities] == [""]


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_nan_is_null_and_a_text_is_a_list_of_one(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    nan, elm = float("nan"), "images/elm.jpg"
    lists = [elm, [elm], [elm, None, nan], nan, None, [], ""]
    _lines(
        folder / "entities.jsonl",
        [{"entity_id": n, "name": "n", "attributes": "a", "images": v} for n, v in enumerate(lists)],
    )
    mention = {"word": "w", "sentence": "s", "entity_id": 0, "split": "train"}
    images = [elm, [elm], nan, None, "", [], [nan]]
    _lines(
        folder / "mentions.jsonl", [mention | {"mention_id": n, "image": v, "year": nan} for n, v in enumerate(images)]
    )
    entities, mentions, findings = _read(JsonlRelease(folder))
    assert not findings
    assert [len(each.images) for each in entities] == [1, 1, 1, 0, 0, 0, 0]
    assert [each.image is not None for each in mentions["train"]] == [True, True] + [False] * 5
    assert not any(each.groups for each in mentions["train"])


def test_empty_cells_of_a_column_of_numbers_are_null(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    (folder / "mentions.jsonl").unlink()
    rows = [{"word": "w", "sentence": "s", "entity_id": "7", "split": "train", "n": n} for n in (1.0, float("nan"))]
    pq.write_table(pa.Table.from_pylist([row | {"image": float("nan")} for row in rows]), folder / "mentions.parquet")
    _, mentions, findings = _read(JsonlRelease(folder))
    assert [dict(each.groups) for each in mentions["train"]] == [{"n": "1.0"}, {}]
    assert {each.reason for each in findings if each.source[0] == "m"} == {"no mention id"}


def test_a_wrong_optional_field_costs_the_field(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    elm = "images/elm.jpg"
    _lines(
        folder / "entities.jsonl",
        [
            {"entity_id": "a", "name": 5, "attributes": True, "images": {"x": elm}},
            {"entity_id": "b", "name": "b", "attributes": "b", "images": [3, elm]},
            {"entity_id": ["c"], "name": "c"},
        ],
    )
    mention = {"mention_id": "m", "word": "w", "sentence": "s", "entity_id": "a", "split": "train"}
    wrong: list[dict[str, Any]] = [{"image": 3}, {"image": [elm, elm]}, {"sentence": 5}, {"mention_id": [1]}]
    _lines(
        folder / "mentions.jsonl", [mention | one for one in wrong] + [mention | {"word": 5}, mention | {"split": 1}]
    )
    entities, mentions, findings = _read(JsonlRelease(folder))
    assert [(each.entity_id, each.name, len(each.images)) for each in entities] == [("a", "", 0), ("b", "b", 1)]
    assert [(each.sentence, each.image) for each in mentions["train"]] == [
        ("s", None),
        ("s", None),
        ("", None),
        ("s", None),
    ]
    shown = [(each.source[0], each.record, each.action, each.detail, each.id) for each in findings]
    assert [one for one in shown if one[3].split(" ")[1:2] == ["is"]] == [
        ("e", 0, "degraded", "attributes is bool", "a"),
        ("e", 0, "degraded", "images is dict", "a"),
        ("e", 0, "degraded", "name is int", "a"),
        ("e", 2, "rejected", "entity_id is list", ""),
        ("m", 0, "degraded", "image is int", "m"),
        ("m", 1, "degraded", "image is list", "m"),
        ("m", 2, "degraded", "sentence is int", "m"),
        ("m", 3, "degraded", "mention_id is list", ""),
        ("m", 4, "rejected", "word is int", "m"),
        ("m", 5, "rejected", "split is int", "m"),
    ]
    assert ("e", 1, "degraded", "images holds something else than names", "b") in shown


def test_mentions_are_split_by_groups_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine", "jsonl")
    mentions = [{"mention_id": n, "word": "oak", "sentence": f"Oak {n // 2}.", "entity_id": 7} for n in range(40)]
    _lines(folder / "mentions.jsonl", [mentions[0] | {"split": "test"}, *mentions[1:]])
    release = open_release(folder, None, ReleaseOptions(split=(50, 25, 25), seed=1), lambda _: None)
    assert release.choices == {"split": "50/25/25", "split_seed": "1", "split_groups": "sentence and picture"}
    assert isinstance(release, JsonlRelease)
    _, found, findings = _read(release)
    assert {split: len(items) for split, items in found.items()} == {"train": 20, "validation": 10, "test": 10}
    assert not [each for each in findings if each.source == "mentions.jsonl"]
    assert sum(len({each.sentence for each in items}) for items in found.values()) == 20


def test_the_documented_example_is_read_without_a_finding(tmp_path: Path) -> None:
    text = (ROOT / "docs/data.md").read_text()
    for name in ("entities", "mentions"):
        (example,) = re.findall(rf"^    # {name}\.jsonl\n((?:    \{{.*\n)+)", text, re.MULTILINE)
        (tmp_path / f"{name}.jsonl").write_text(example)
    entities, mentions, findings = _read(JsonlRelease(tmp_path))
    assert not findings
    assert len(entities) > 2
    assert all(mentions.values())
    assert entities[0].attributes.endswith(".")
