"""What a record calls an image and the file that it means: by whole paths, and nothing is guessed."""

import json
import unicodedata
import zipfile
from pathlib import Path

import pytest

from data_prep.formats.image_files import ImageFiles, ImagePaths, read_image
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, RawEntity, RawImage, RawMention, ReleaseOptions

FORMS = ["folder", "zip", "zip with its name"]


def _container(folder: Path, form: str, paths: list[str], name: str = "kb_image") -> Path:
    """A folder or zip of files that hold their own paths."""
    if form == "folder":
        for path in paths:
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_text(path)
        return folder / name
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for path in paths:
            archive.writestr(f"{name}/{path}" if form == "zip with its name" else path, path)
    return folder / f"{name}.zip"


def _content(image: RawImage) -> str:
    """What the image's file holds, so its path; or why there is none."""
    if image.path:
        return read_image(image, 1 << 10).decode()
    return "ambiguous" if image.fits else "missing"


def _found(files: ImageFiles, *names: str) -> list[str]:
    return [_content(files.find(name, [name])) for name in names]


@pytest.mark.parametrize("form", FORMS)
def test_files_of_one_name_in_many_folders_are_told_apart_by_their_paths(tmp_path: Path, form: str) -> None:
    paths = ["Q0/0.jpg", "Q1/0.jpg", "deep/Q2/0.jpg", "Q0/own.jpg"]
    files = ImageFiles([_container(tmp_path, form, paths)])
    assert _found(files, "Q0/0.jpg", "./Q1/0.jpg", "Q2/0.jpg", "deep\\Q2\\0.jpg") == [
        "Q0/0.jpg",
        "Q1/0.jpg",
        "deep/Q2/0.jpg",
        "deep/Q2/0.jpg",
    ]
    assert _found(files, "kb_image/Q1/0.jpg", "/data/kb_image/Q0/0.jpg") == ["Q1/0.jpg", "Q0/0.jpg"]
    assert _found(files, "own.jpg") == ["Q0/own.jpg"]  # a base name that is there once
    assert _found(files, "0.jpg") == ["ambiguous"]
    assert _found(files, "Q3/0.jpg", "Q1/own.jpg", "none.jpg") == ["missing"] * 3  # another folder is another file
    assert "Q0/0.jpg and " in files.find("0.jpg", ["0.jpg"]).fits
    assert files.find("0.jpg", ["0.jpg"]).fits.endswith("and 1 more")


@pytest.mark.parametrize("form", FORMS)
def test_the_only_folder_left_does_not_stand_for_others(tmp_path: Path, form: str) -> None:
    files = ImageFiles([_container(tmp_path, form, ["Q2/0.jpg", "Q2/1.jpg"])])
    assert _found(files, "Q0/0.jpg", "Q1/0.jpg", "Q2/0.jpg") == ["missing", "missing", "Q2/0.jpg"]


@pytest.mark.parametrize("form", FORMS)
def test_files_without_folders_are_found_by_names_with_one(tmp_path: Path, form: str) -> None:
    files = ImageFiles([_container(tmp_path, form, ["a.jpg", "b.jpg"])])
    assert _found(files, "images/a.jpg", "images/b.jpg", "/home/me/images/b.jpg") == ["a.jpg", "b.jpg", "b.jpg"]
    assert _found(files, "others/a.jpg") == ["ambiguous"]  # images/a.jpg has it: they cannot both be meant
    assert "images/... does" in files.find("x", ["others/a.jpg"]).fits
    assert _found(files, "images/a.jpg", "a.jpg") == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize("form", FORMS)
def test_escapes_accents_and_case_make_no_difference_unless_they_tell_files_apart(tmp_path: Path, form: str) -> None:
    composed = "caf\u00e9 1.jpg"
    decomposed = unicodedata.normalize("NFD", composed)
    paths = [f"Deep/{decomposed}", "Photo.JPG", "one.jpg", "ONE.jpg", "One.jpg", "100%25.jpg", "a%20b.jpg", "a b.jpg"]
    files = ImageFiles([_container(tmp_path, form, paths)])
    for name in (f"Deep/{composed}", f"deep/{decomposed}", composed.upper(), "Deep/caf%C3%A9%201.jpg"):
        assert _found(files, name) == [f"Deep/{decomposed}"], name
    assert _found(files, "photo.jpg", "PHOTO.JPG") == ["Photo.JPG", "Photo.JPG"]
    assert _found(files, "one.jpg", "ONE.jpg", "oNe.jpg") == ["one.jpg", "ONE.jpg", "ambiguous"]
    assert _found(files, "a%20b.jpg", "a b.jpg", "100%25.jpg") == ["a%20b.jpg", "a b.jpg", "100%25.jpg"]


def test_a_later_candidate_as_it_is_written_goes_before_an_earlier_one_in_another_case(tmp_path: Path) -> None:
    files = ImageFiles([_container(tmp_path, "folder", ["A.jpg", "a.png"])])
    assert _content(files.find("a.png", ["a.jpg", "a.png"])) == "a.png"
    assert _content(files.find("a.png", ["b.jpg", "A.PNG"])) == "a.png"


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    folder = _container(tmp_path, "folder", ["in/a.jpg"])
    (folder / "in/again").symlink_to(folder)
    _container(tmp_path, "folder", ["b.jpg"], "elsewhere")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    files = ImageFiles([folder])
    assert _found(files, "in/a.jpg", "linked/b.jpg") == ["in/a.jpg", "b.jpg"]
    assert files.files() == [folder / "in/a.jpg", folder / "linked/b.jpg"]


def test_paths_of_ones_own_release_follow_the_same_rule(tmp_path: Path) -> None:
    composed = "caf\u00e9.jpg"
    decomposed = unicodedata.normalize("NFD", composed)
    _container(tmp_path, "folder", [decomposed, "A/0.jpg", "B/0.jpg", "B/b.jpg"], "images")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/secret.jpg").write_text("hidden")
    _container(tmp_path, "zip", ["images/zipped.jpg", "C/c.jpg"], "images")
    paths = ImagePaths(tmp_path)

    def found(name: str) -> str:
        image = paths.find(name)
        return "outside" if image is None else _content(image)

    assert found(f"images/{composed}") == decomposed
    assert [found(name) for name in ("images/A/0.jpg", "B/0.jpg", "b.JPG", "pictures/B/b.jpg")] == [
        "A/0.jpg",
        "B/0.jpg",
        "B/b.jpg",
        "B/b.jpg",
    ]
    assert [found(name) for name in ("images/zipped.jpg", "zipped.jpg", "c.jpg")] == [
        "images/zipped.jpg",
        "images/zipped.jpg",
        "C/c.jpg",
    ]
    assert [found(name) for name in ("0.jpg", "C/0.jpg", "secret.jpg")] == ["ambiguous", "missing", "missing"]
    assert found(".hidden/secret.jpg") == "hidden"  # as it is written


def _mimic(folder: Path, images: list[str], mention_images: list[str]) -> None:
    folder.mkdir()
    kb = [{"qid": f"Q{n}", "entity_name": f"N{n}", "attr": "a", "image_list": [name]} for n, name in enumerate(images)]
    mentions = [{"id": name, "mentions": "w", "answer": "Q0", "imgPath": name} for name in mention_images]
    (folder / "kb_entity.json").write_text(json.dumps(kb))
    for split in ("train", "dev", "test"):
        (folder / f"X_{split}.json").write_text(json.dumps(mentions))


def _of_release(folder: Path) -> tuple[list[str], list[str]]:
    release = open_release(folder, None, ReleaseOptions(), lambda _: None)
    entities = [item for item in release.entities() if isinstance(item, RawEntity)]
    mentions = [item for item in release.mentions("train") if isinstance(item, RawMention)]
    assert not [item for item in release.mentions("train") if isinstance(item, Finding)]
    return (
        [_content(image) for entity in entities for image in entity.images],
        [_content(mention.image) for mention in mentions if mention.image],
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_entity_and_mention_of_the_mimic_layout_has_its_own_picture(tmp_path: Path, form: str) -> None:
    entities, mentions = ["Q0/0.jpg", "Q1/0.jpg"], ["train/0.jpg", "dev/0.jpg"]
    _mimic(tmp_path / "release", entities, [*mentions, "dev/0.png", "http://x/y/0.jpg"])
    _container(tmp_path / "release", form, entities)
    _container(tmp_path / "release", form, mentions, "mention_image")
    assert _of_release(tmp_path / "release") == (entities, [*mentions, "dev/0.jpg", "ambiguous"])


def test_a_folder_too_deep_is_found(tmp_path: Path) -> None:
    _mimic(tmp_path / "release", ["Q0_0.jpg"], ["a.png"])
    _container(tmp_path / "release", "folder", ["kb_image/Q0_0.jpg"])
    _container(tmp_path / "release", "folder", ["unpacked/here/a.jpg"], "mention_image")
    assert _of_release(tmp_path / "release") == (["kb_image/Q0_0.jpg"], ["unpacked/here/a.jpg"])


def test_pictures_of_melbench_in_folders(tmp_path: Path) -> None:
    records = {str(n): {"id": n, "mentions": "w", "answer": "Q0", "imgPath": f"{n}/0.png"} for n in range(2)}
    records["7"] = {"id": 7, "mentions": "w", "answer": "Q0"}
    (tmp_path / "X-MEL.json").write_text(json.dumps(records))
    (tmp_path / "kb_entity.json").write_text(json.dumps([{"qid": "Q0", "entity_name": "n", "attr": "a"}]))
    _container(tmp_path, "folder", ["0/0.jpg", "1/0.jpg", "ids/7.JPG"], "images")
    release = open_release(tmp_path, None, ReleaseOptions(split=(100, 0, 0)), lambda _: None)
    images = [item.image for item in release.mentions("train") if isinstance(item, RawMention)]
    assert [image and _content(image) for image in images] == ["0/0.jpg", "1/0.jpg", "ids/7.JPG"]
