"""The parser of the MIMIC layout: what it takes, what it refuses, and how it finds pictures."""

import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from data_prep.build.rules import checked_entities, checked_mentions
from data_prep.formats.image_files import read_image
from data_prep.formats.mimic import MimicRelease
from data_prep.formats.release import Finding, RawEntity, RawImage, RawMention, ReleaseOptions
from dsmip.errors import UserError
from tests.support.paths import ROOT
from tests.support.small_release import KB, VALIDATION, faulty_release

SHARED = ROOT.parent / "shared"


@pytest.fixture
def release(tmp_path: Path) -> MimicRelease:
    return MimicRelease(faulty_release(tmp_path / "release"))


def _entities(release: MimicRelease) -> tuple[list[RawEntity], list[Finding]]:
    findings: list[Finding] = []
    return list(checked_entities(release.entities(), findings.append)), findings


def _kept(release: MimicRelease, split: str) -> tuple[list[RawMention], list[Finding]]:
    findings: list[Finding] = []
    rows = {entity.entity_id: row for row, entity in enumerate(_entities(release)[0])}
    return list(checked_mentions(release.mentions(split), rows, findings.append)), findings


def _shown(findings: list[Finding]) -> list[tuple[str, int, str, str, str]]:
    return [(each.source, each.record, each.reason, each.action, each.detail) for each in findings]


def test_entities_keep_release_order_and_faults_are_named(release: MimicRelease) -> None:
    kept, findings = _entities(release)
    assert [(entity.entity_id, entity.name, entity.attributes) for entity in kept] == [
        ("Q1", "Ash", "tree"),
        ("Q2", "Birch", ""),
        ("Q3", "Cédar", ""),
        ("Q6", "Elm", "tree"),
    ]
    assert [(finding.record, finding.reason, finding.action) for finding in findings] == [
        (1, "empty attributes", "degraded"),
        (2, "duplicate entity", "rejected"),
        (3, "empty attributes", "degraded"),
        (4, "wrong type", "rejected"),
        (6, "wrong type", "rejected"),
    ]
    assert findings[3].detail == "qid is int"


def test_mentions_without_a_usable_gold_or_word_are_rejected(release: MimicRelease) -> None:
    kept, findings = _kept(release, "train")
    assert [mention.mention_id for mention in kept] == ["a", "7", "T_train-7", "i", "k", "l"]
    rejected = {finding.record: finding.reason for finding in findings if finding.action == "rejected"}
    assert rejected == {
        2: "nil gold",
        3: "null gold",
        4: "unknown gold",
        5: "empty word",
        6: "wrong type",
        9: "broken text",
    }
    assert [finding.reason for finding in findings if finding.record == 7] == ["no mention id", "empty sentence"]


def test_unknown_scalars_become_groups(release: MimicRelease) -> None:
    kept, _ = _kept(release, "train")
    assert kept[0].groups == {"kind": "t"}
    assert kept[1].groups == {"year": "1999"}


def test_pictures_are_found_by_the_releases_naming(release: MimicRelease) -> None:
    kept, _ = _kept(release, "train")
    found = {mention.mention_id: mention.image.path for mention in kept if mention.image}
    assert {key: path.name if path else None for key, path in found.items()} == {
        "a": "Photo.jpg",
        "T_train-7": None,
        "i": "literal.name.png",
        "k": "broken.jpg",
        "l": "a b.jpg",
    }
    entities = [item for item in release.entities() if isinstance(item, RawEntity)]
    assert [image.path and image.path.name for image in entities[3].images] == ["broken.jpg", "Q3 x.jpg"]


def test_either_folder_of_mention_images_is_read(release: MimicRelease) -> None:
    expected = [mention.image for mention in _kept(release, "train")[0]]
    single, plural = release.folder / "mention_image", release.folder / "mention_images"
    single.rename(plural)
    found = [mention.image for mention in _kept(MimicRelease(release.folder), "train")[0]]
    assert sum(image is not None and image.path is not None for image in expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert (one and one.path) == (other and other.path and plural / other.path.name)
    assert ("mention_images/Photo.jpg", plural / "Photo.jpg") in MimicRelease(release.folder).files()
    single.mkdir()
    with pytest.raises(UserError, match="has both mention_image/ and mention_images/; keep the one"):
        MimicRelease(release.folder)


@pytest.mark.parametrize("name", ["../T_train.json", "/etc/hostname", "..", "%2e%2e%2fT_train.json"])
def test_no_picture_outside_its_folder(release: MimicRelease, name: str) -> None:
    path = next(release.folder.glob("*_test.json"))
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"imgPath": name} for record in records]))
    images = [mention.image for mention in _kept(MimicRelease(release.folder), "test")[0]]
    assert images
    assert all(image and image.name == name and image.path is None for image in images)


def test_files_are_all_that_a_dataset_depends_on(release: MimicRelease) -> None:
    (release.folder / "README.txt").write_text("no part of it")
    _zip(release.folder / "kb_image.zip", {"Q9.jpg": b"x"})
    (release.folder / "qid2id.json").write_text("{}")
    names = [path.relative_to(release.folder).as_posix() for path in release.folder.rglob("*") if path.is_file()]
    files = MimicRelease(release.folder).files()
    assert sorted(name for name, _ in files) == sorted({*names} - {"README.txt"})
    assert all(path == release.folder / name for name, path in files)


def test_missing_files_are_named_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        MimicRelease(tmp_path / "nowhere")
    folder = faulty_release(tmp_path / "release")
    (folder / "T_dev.json").rename(folder / "T_develop.json")
    with pytest.raises(UserError, match=r"looked for one file \*_dev.json, found .*T_develop.json"):
        MimicRelease(folder)
    (folder / "T_develop.json").rename(folder / "T_dev.json")
    (folder / "U_dev.json").write_text("[]")
    with pytest.raises(UserError, match=r"found T_dev.json, U_dev.json"):
        MimicRelease(folder)
    (folder / "U_dev.json").unlink()
    (folder / "kb_entity.json").unlink()
    with pytest.raises(UserError, match=r"looked for kb_entity.json, found T_dev.json"):
        MimicRelease(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"id" 1}\n]', r"T_test.json: line 2 column 7: wrong JSON"),
        (b'[\n"\xff"]', r"T_test.json: line 2 column 2: not UTF-8"),
        (b"{}", r"T_test.json: expected a JSON array of records, found an object"),
    ],
)
def test_wrong_json_names_file_line_and_column(release: MimicRelease, content: bytes, message: str) -> None:
    (release.folder / "T_test.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(release.mentions("test"))


def test_names_and_words_are_percent_decoded(release: MimicRelease) -> None:
    kb = [{"qid": "Q1", "entity_name": "Z%C3%BCrich%20(100%)", "attr": "50%2C is as it is"}]
    mention = {"id": 1, "mentions": "Caf%C3%A9", "sentence": "a%20b", "answer": "Q1"}
    (release.folder / "kb_entity.json").write_text(json.dumps(kb))
    (release.folder / "T_dev.json").write_text(json.dumps([mention, mention | {"mentions": "100%de%FF"}]))
    entities, _ = _entities(release)
    assert (entities[0].name, entities[0].attributes) == ("Zürich (100%)", "50%2C is as it is")
    kept, _ = _kept(release, "validation")
    assert [(each.word, each.sentence) for each in kept] == [("Café", "a%20b"), ("100%de%FF", "a%20b")]


def test_texts_by_choice(release: MimicRelease) -> None:
    assert release.choices == {"entity_text": "attr", "mention_text": "sentence"}
    options = ReleaseOptions(entity_text="desc", mention_text="sentence+desc")
    kb, records = json.loads(json.dumps(KB[:4])), json.loads(json.dumps(VALIDATION * 3))
    kb[0] |= {"desc": " a tree ", "instance": "plant"}
    records[1] |= {"desc": "said of it", "type": "entity", "instance": "x"}
    records[2]["desc"] = {"no": "text"}
    (release.folder / "kb_entity.json").write_text(json.dumps(kb))
    (release.folder / "T_dev.json").write_text(json.dumps(records))
    chosen = MimicRelease(release.folder, options)
    assert chosen.choices == {"entity_text": "desc", "mention_text": "sentence+desc"}
    entities, findings = _entities(chosen)
    assert [entity.attributes for entity in entities] == ["a tree", "", ""]
    reasons = Counter(finding.reason for finding in findings)
    assert reasons == {"no desc": 3, "empty attributes": 2, "duplicate entity": 1}
    kept, findings = _kept(chosen, "validation")
    assert [(each.sentence, dict(each.groups)) for each in kept] == [("s", {}), ("s said of it", {}), ("s", {})]
    assert [(each.record, each.reason, each.action) for each in findings] == [
        (0, "no desc", "degraded"),
        (1, "duplicate mention id", "repaired"),
        (2, "wrong type", "degraded"),
        (2, "no desc", "degraded"),
        (2, "duplicate mention id", "repaired"),
    ]
    with pytest.raises(UserError, match=r'T_test.json: no record has the key "desc"'):
        _kept(chosen, "test")
    (release.folder / "kb_entity.json").write_text(json.dumps(KB))
    with pytest.raises(UserError, match=r'kb_entity.json: no record has the key "desc"'):
        _entities(chosen)
    with pytest.raises(UserError, match=r"--split: the layout mimic has no such choice"):
        MimicRelease(release.folder, ReleaseOptions(split=(70, 10, 20)))


def test_ids_and_qid2id_are_compared_with_the_order_of_the_list(release: MimicRelease) -> None:
    kb = [{"id": number, "qid": qid, "entity_name": "n", "attr": "a"} for number, qid in enumerate("ABCDE")]
    kb[3]["id"] = 9
    (release.folder / "kb_entity.json").write_text(json.dumps(kb))
    rows = release.folder / "qid2id.json"
    rows.write_text(json.dumps({"A": 0, "B": 5, "C": "2", "D": 9, "Z": 4}))
    entities, findings = _entities(release)
    assert [entity.entity_id for entity in entities] == list("ABCDE")
    assert _shown(findings) == [
        ("kb_entity.json", 1, "qid2id.json disagrees", "repaired", "B is 5 there"),
        ("kb_entity.json", 2, "qid2id.json disagrees", "repaired", "C is 2 there"),
        ("kb_entity.json", 3, "non-contiguous id", "repaired", "D: 9"),
        ("kb_entity.json", 4, "qid2id.json disagrees", "repaired", "E is not in it"),
        ("qid2id.json", 4, "not in kb_entity.json", "repaired", "Z"),
    ]
    rows.write_text(json.dumps({"A": 7}))
    with pytest.raises(UserError, match=r"qid2id.json: agrees with no record of kb_entity.json"):
        _entities(release)
    rows.write_text("[]")
    with pytest.raises(UserError, match=r"qid2id.json: expected a JSON object"):
        _entities(release)


def test_pictures_may_still_be_in_their_zips(release: MimicRelease) -> None:
    expected = {name: read_image(found, 1 << 20) for name, found in _found(release).items()}
    for part in ("kb_image", "mention_image"):
        folder = release.folder / part
        _zip(release.folder / f"{part}.zip", {f"{part}/{path.name}": path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(folder)
    zipped = MimicRelease(release.folder)
    assert {name: read_image(found, 1 << 20) for name, found in _found(zipped).items()} == expected
    assert {path.suffix for _, path in zipped.files()} == {".json", ".zip"}
    assert all(found.size == len(expected[name]) for name, found in _found(zipped).items())
    (release.folder / "kb_image").mkdir()
    (release.folder / "kb_image/Q1.jpg").write_bytes(b"unpacked")
    assert read_image(_found(MimicRelease(release.folder))["Q1.jpg"], 100) == b"unpacked"


def test_refused_members_are_found_once(release: MimicRelease) -> None:
    for part in ("kb_image", "mention_image"):
        _zip(release.folder / f"{part}.zip", {"../out.jpg": b"x", f"in/{part}.jpg": b"x"})
    bad = MimicRelease(release.folder)
    for items, source in ((bad.entities(), "kb_image.zip"), (bad.mentions("train"), "mention_image.zip")):
        findings = [item for item in items if isinstance(item, Finding) and item.reason != "wrong type"]
        assert _shown(findings) == [
            (source, 0, "archive member refused", "degraded", "../out.jpg: path with .."),
        ]
    assert not [item for item in bad.mentions("test") if isinstance(item, Finding)]


def _found(release: MimicRelease) -> dict[str, RawImage]:
    """The pictures that were found, by what the records call them."""
    items = [*release.entities(), *release.mentions("train"), *release.mentions("test")]
    named = [item.images for item in items if isinstance(item, RawEntity)]
    named += [(item.image,) for item in items if isinstance(item, RawMention) and item.image]
    return {image.name: image for images in named for image in images if image.path}


def _zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data/emoji_mel").is_dir(), reason="needs the emoji release")
def test_emoji_release_is_read_whole() -> None:
    release = MimicRelease(SHARED / "data/emoji_mel")
    entities, findings = _entities(release)
    assert not findings
    assert len(entities) == 3781
    assert sum(bool(entity.images) for entity in entities) == 3592
    mentions: dict[str, list[RawMention]] = {}
    for split in ("train", "test"):
        mentions[split], findings = _kept(release, split)
        assert not findings
    assert {split: len(items) for split, items in mentions.items()} == {"train": 3156, "test": 500}
    assert all(mention.image is None or mention.image.path for mention in mentions["train"])
    assert set(Counter(name for mention in mentions["test"] for name in mention.groups)) == {"kind", "source", "vendor"}
