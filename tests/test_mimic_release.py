"""The parser of the MIMIC layout: what it takes, what it refuses, and how it finds pictures."""

from collections import Counter
from pathlib import Path

import pytest
from small_release import faulty_release

from data_prep.mimic_release import MimicRelease
from data_prep.release import Finding, RawEntity, RawMention, checked_entities, checked_mentions
from dsmip.errors import UserError

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture
def release(tmp_path: Path) -> MimicRelease:
    return MimicRelease(faulty_release(tmp_path / "release"))


def _kept(release: MimicRelease, split: str) -> tuple[list[RawMention], list[Finding]]:
    findings: list[Finding] = []
    rows = {entity.entity_id: row for row, entity in enumerate(checked_entities(release.entities(), []))}
    return checked_mentions(release.mentions(split), rows, findings), findings


def test_entities_keep_release_order_and_faults_are_named(release: MimicRelease) -> None:
    findings: list[Finding] = []
    kept = checked_entities(release.entities(), findings)
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
    found = {mention.mention_id: mention.picture.path for mention in kept if mention.picture}
    assert {key: path.name if path else None for key, path in found.items()} == {
        "a": "Photo.jpg",
        "T_train-7": None,
        "i": "literal.name.png",
        "k": "broken.jpg",
        "l": "a b.jpg",
    }
    entities = [item for item in release.entities() if isinstance(item, RawEntity)]
    assert [picture.path and picture.path.name for picture in entities[3].pictures] == ["broken.jpg", "Q3 x.jpg"]


def test_either_folder_of_mention_pictures_is_read(release: MimicRelease) -> None:
    expected = [mention.picture for mention in _kept(release, "train")[0]]
    single, plural = release.folder / "mention_image", release.folder / "mention_images"
    single.rename(plural)
    found = [mention.picture for mention in _kept(MimicRelease(release.folder), "train")[0]]
    assert sum(picture is not None and picture.path is not None for picture in expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert (one and one.path) == (other and other.path and plural / other.path.name)
    before = MimicRelease(release.folder).sha256()
    (plural / "Photo.jpg").write_bytes(b"other")
    assert MimicRelease(release.folder).sha256() != before
    single.mkdir()
    with pytest.raises(UserError, match="has both mention_image/ and mention_images/; keep the one"):
        MimicRelease(release.folder)


@pytest.mark.parametrize("name", ["../T_train.json", "/etc/hostname", "..", "%2e%2e%2fT_train.json"])
def test_no_picture_outside_its_folder(release: MimicRelease, name: str) -> None:
    picture = release._mention_picture(name)
    assert picture is not None
    assert picture.path is None


def test_the_hash_sees_records_and_pictures(release: MimicRelease) -> None:
    def digest() -> str:
        return MimicRelease(release.folder).sha256()

    first = digest()
    assert digest() == first
    (release.folder / "kb_image" / "Q1.jpg").write_bytes(b"other")
    second = digest()
    (release.folder / "T_test.json").write_text("[]")
    assert len({first, second, digest()}) == 3


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
        (b"{}", r"T_test.json: expected a JSON array of records, found dict"),
    ],
)
def test_wrong_json_names_file_line_and_column(release: MimicRelease, content: bytes, message: str) -> None:
    (release.folder / "T_test.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(release.mentions("test"))


@pytest.mark.skipif(not (SHARED / "data/emoji_mel").is_dir(), reason="needs the emoji release")
def test_emoji_release_is_read_whole() -> None:
    release = MimicRelease(SHARED / "data/emoji_mel")
    findings: list[Finding] = []
    entities = checked_entities(release.entities(), findings)
    rows = {entity.entity_id: row for row, entity in enumerate(entities)}
    mentions = {split: checked_mentions(release.mentions(split), rows, findings) for split in ("train", "test")}
    assert not findings
    assert len(entities) == 3781
    assert sum(bool(entity.pictures) for entity in entities) == 3592
    assert {split: len(items) for split, items in mentions.items()} == {"train": 3156, "test": 500}
    assert all(mention.picture is None or mention.picture.path for mention in mentions["train"])
    assert set(Counter(name for mention in mentions["test"] for name in mention.groups)) == {"kind", "source", "vendor"}
