"""The MELBench layout: records of one and of several mentions, pictures by id, splits by ids or by groups."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.build.rules import checked_mentions
from data_prep.formats.melbench import MelbenchRelease
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, RawMention, ReleaseOptions
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError

KB = [{"qid": f"Q{n}", "entity_name": f"Name {n}", "attr": "", "image_list": [f"Q{n}.jpg"]} for n in range(1, 5)]
SCALAR: dict[str, Any] = {
    "Q1": {"id": "Q1", "sentence": " The ash. ", "mentions": "ash", "entities": "Ash", "answer": "Q1", "kind": "t"},
    "2-0": {"id": 2, "sentence": "A birch", "mentions": "birch", "entities": "Birch", "answer": "Q2"},
    "3": {"sentence": "An elm", "mentions": "elm", "answer": "Q3", "imgPath": "x/Photo.of.elm.PNG"},
    "4": {"id": "4", "sentence": "nothing", "mentions": "none", "answer": "Q99"},
    "5": ["no record"],
    "6": {"id": "6", "sentence": 7, "mentions": "none", "answer": "Q1"},
    "7": {"id": "7", "sentence": "mixed", "mentions": "none", "answer": ["Q1"]},
}
LISTS: dict[str, Any] = {
    "10": {
        "id": "10",
        "sentence": "Ash, elm",
        "mentions": ["Ash", "elm"],
        "entities": ["A", "E"],
        "answer": ["Q1", "Q3"],
    },
    "11": {"id": "11", "sentence": "Short", "mentions": ["a", "b"], "entities": ["A", "B"], "answer": ["Q1"]},
    "12": {"id": "12", "sentence": "Half", "mentions": ["a", 5, "c"], "answer": ["Q1", "Q2", None]},
    "13": {"id": "13", "sentence": "None", "mentions": [], "answer": []},
    "14": {"id": "14", "sentence": "ASH,  elm", "mentions": ["elm"], "answer": ["Q3"]},
}
IDS = {"train": ["Q1", 2, "10"], "dev": ["3"], "test": ["4", "12-0", "14"]}


def _write(folder: Path, records: dict[str, Any], name: str = "Wikidata-MEL.json", kb: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(records))
    if kb:
        (folder / "kb_entity.json").write_text(json.dumps(KB))
    (folder / "images").mkdir()
    for image in ("Q1.jpg", "2.PNG", "Photo.jpg"):
        (folder / "images" / image).write_bytes(image.encode())
    return folder


def _read(release: MelbenchRelease) -> tuple[dict[str, list[RawMention]], list[Finding]]:
    findings: list[Finding] = []
    rows = {str(entity["qid"]): row for row, entity in enumerate(KB)}
    mentions = {split: list(checked_mentions(release.mentions(split), rows, findings.append)) for split in SPLITS}
    return mentions, findings


def test_records_of_one_mention(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", SCALAR, "Richpedia-MEL.json")
    (folder / "splits.json").write_text(json.dumps(IDS))
    release = open_release(folder, None, ReleaseOptions())
    assert isinstance(release, MelbenchRelease)
    assert release.choices == {"kb": "kb_entity.json", "entity_text": "attr", "split": "splits.json"}
    mentions, findings = _read(release)
    found = {
        split: [(m.mention_id, m.word, m.sentence, m.gold, dict(m.groups)) for m in items]
        for split, items in mentions.items()
    }
    assert found == {
        "train": [("Q1", "ash", "The ash.", "Q1", {"kind": "t"}), ("2-0", "birch", "A birch", "Q2", {})],
        "validation": [("3", "elm", "An elm", "Q3", {})],
        "test": [],
    }
    images = [m.image and m.image.path and m.image.path.name for items in mentions.values() for m in items]
    assert images == ["Q1.jpg", "2.PNG", "Photo.jpg"]
    assert [(finding.record, finding.reason, finding.detail) for finding in findings] == [
        (4, "wrong type", "record is list"),
        (5, "wrong type", "sentence is int"),
        (5, "in no split", "6"),
        (6, "wrong type", "answer is list"),
        (3, "unknown gold", "Q99"),
    ]
    assert [(finding.action, finding.id) for finding in findings] == [
        ("rejected", "5"),
        ("degraded", "6"),
        ("rejected", "6"),
        ("rejected", "7"),
        ("rejected", "4"),
    ]
    names = [name for name, _ in release.files()]
    assert names[:2] == ["Richpedia-MEL.json", "splits.json"]
    assert {"images/2.PNG", "kb/kb_entity.json"} <= set(names)


def test_records_of_several_mentions_and_lists_of_ids(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", LISTS)
    for name, ids in {"train_ids.txt": "10\n", "valid_ids.txt": "\n", "test_ids.txt": "12-0\n 14 \n"}.items():
        (folder / name).write_text(ids)
    mentions, findings = _read(MelbenchRelease(folder))
    assert [(m.mention_id, m.word, m.gold) for m in mentions["train"]] == [("10-0", "Ash", "Q1"), ("10-1", "elm", "Q3")]
    assert [m.mention_id for m in mentions["test"]] == ["12-0", "14-0"]
    assert not mentions["validation"]
    assert [(finding.record, finding.reason, finding.detail) for finding in findings] == [
        (1, "lists of different lengths", "mentions 2, entities 2, answer 1"),
        (2, "wrong type", "mention 1 of 12"),
        (2, "in no split", "12-2"),
        (3, "no mentions", "13"),
    ]


def test_a_split_by_groups_takes_records_of_a_sentence_together(tmp_path: Path) -> None:
    records = {
        str(n): {"id": str(n), "sentence": f"Caption  {n // 3}".upper() if n % 2 else f"caption {n // 3}"}
        | {"mentions": ["a", "b"], "answer": ["Q1", "Q2"], "imgPath": f"{n % 50}.jpg" if n < 100 else ""}
        for n in range(300)
    }
    folder = _write(tmp_path / "release", records)
    release = MelbenchRelease(folder, ReleaseOptions(split=(70, 10, 20), seed=3))
    mentions, findings = _read(release)
    assert release.choices["split"] == "70/10/20"
    assert not findings
    assert sum(map(len, mentions.values())) == 600
    sentences = [{mention.sentence.lower().split()[1] for mention in items} for items in mentions.values()]
    images = [
        {mention.image.name for mention in items if mention.image and mention.record < 100}
        for items in mentions.values()
    ]
    for kind in (sentences, images):
        assert sum(map(len, kind)) == len(set().union(*kind))
    assert abs(len(mentions["train"]) - 420) < 12
    assert abs(len(mentions["test"]) - 120) < 12
    again = MelbenchRelease(folder, ReleaseOptions(split=(70, 10, 20), seed=3))
    assert _read(again) == (mentions, findings)


def test_pictures_in_a_zip_and_a_knowledge_base_elsewhere(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", SCALAR, kb=False)
    with zipfile.ZipFile(folder / "image.zip", "w") as archive:
        archive.writestr("image/3.jpeg", b"elm")
    (folder / "images/Photo.jpg").unlink()
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb/kb_entity.json").write_text(json.dumps(KB))
    for kb in (tmp_path / "kb", tmp_path / "kb/kb_entity.json"):
        release = MelbenchRelease(folder, ReleaseOptions(kb=kb, split=(100, 0, 0)))
        assert [entity.entity_id for entity in release.entities() if not isinstance(entity, Finding)] == [
            "Q1",
            "Q2",
            "Q3",
            "Q4",
        ]
        assert release.choices["kb"] == kb.name
        elm = _read(release)[0]["train"][2]
        assert elm.image
        assert elm.image.member == "image/3.jpeg"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path / "release", LISTS, kb=False)
    with pytest.raises(UserError, match=r"has no knowledge base .* say by --kb"):
        MelbenchRelease(folder)
    with pytest.raises(UserError, match=r"images: looked for a knowledge base .*, found none"):
        MelbenchRelease(folder, ReleaseOptions(kb=folder / "images"))
    (folder / "kb_entity.json").write_text("[]")
    with pytest.raises(UserError, match=r"has no splits; pass --split 70/10/20"):
        MelbenchRelease(folder)
    with pytest.raises(UserError, match=r"--split 70/10/10: takes percentages"):
        MelbenchRelease(folder, ReleaseOptions(split=(70, 10, 10)))
    (folder / "Richpedia-MEL.json").write_text("{}")
    with pytest.raises(UserError, match=r"one file \*-MEL.json, found Richpedia-MEL.json, Wikidata-MEL.json"):
        MelbenchRelease(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"splits.json": '{"train": ["1"], "dev": []}'}, "splits.json: has no test"),
        ({"splits.json": '{"train": ["1"], "eval": []}'}, '"eval" is no split or comes twice'),
        ({"splits.json": '{"train": ["1"], "dev": [true], "test": []}'}, "dev must be a list of ids"),
        ({"splits.json": '{"train": ["1"], "dev": [1], "test": []}'}, "id '1' is in train and in validation"),
        ({"train_ids.txt": "1", "test_ids.txt": "2"}, "need one for validation, found no dev_ids.txt"),
        (
            {"train_ids.txt": "1", "dev_ids.txt": "2", "val_ids.txt": "2", "test_ids.txt": "2"},
            "need one for validation, found dev_ids.txt and val_ids.txt",
        ),
    ],
)
def test_wrong_files_of_ids_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    folder = _write(tmp_path / "release", LISTS)
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        MelbenchRelease(folder)
