"""Pictures in folders and zips: what is found, what of a zip is refused by name, and what a damaged one leads to."""

import contextlib
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.formats import image_files
from data_prep.formats.image_files import ImageFiles, ImagePaths, base_name, read_image
from data_prep.formats.release import RawImage
from dsmip.errors import UserError

LIMIT = 1 << 16


def _info(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def _flagged_encrypted(path: Path, member: bytes) -> None:
    """Sets the member's flag in the list at the zip's end."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(member) - 46
    content[entry + 8] |= 1
    path.write_bytes(content)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Two sound members among all kinds of bad ones."""
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/good.jpg", b"good")
        archive.writestr("../up.jpg", b"x")
        archive.writestr("a\\..\\..\\back.jpg", b"x")
        archive.writestr("/root.jpg", b"x")
        archive.writestr("C:\\drive.jpg", b"x")
        archive.writestr(_info("link.jpg", stat.S_IFLNK | 0o777), b"/etc/hostname")
        archive.writestr(_info("pipe.jpg", stat.S_IFIFO | 0o644), b"")
        archive.writestr("bomb.jpg", bytes(3 << 19), compresslevel=9)
        archive.writestr("large.jpg", bytes(5 << 19), zipfile.ZIP_STORED)
        archive.writestr("secret.jpg", b"x")
        archive.writestr("folder/", b"")
        archive.writestr(_info("plain.jpg", stat.S_IFREG | 0o644), bytes(1 << 19))
    _flagged_encrypted(path, b"secret.jpg")
    return path


def test_bad_members_are_refused_by_name(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 2 << 20)
    images = ImageFiles([hostile])
    assert [(each.source, each.record, each.action, each.detail) for each in images.refused] == [
        ("bad.zip", 1, "degraded", "../up.jpg: path with .."),
        ("bad.zip", 2, "degraded", "a\\..\\..\\back.jpg: path with .."),
        ("bad.zip", 3, "degraded", "/root.jpg: absolute path"),
        ("bad.zip", 4, "degraded", "C:\\drive.jpg: absolute path"),
        ("bad.zip", 5, "degraded", "link.jpg: link"),
        ("bad.zip", 6, "degraded", "pipe.jpg: no plain file"),
        ("bad.zip", 7, "degraded", "bomb.jpg: shrunk more than 200 times"),
        ("bad.zip", 8, "degraded", "large.jpg: larger than 2097152 bytes"),
        ("bad.zip", 9, "degraded", "secret.jpg: encrypted"),
    ]
    assert {each.reason for each in images.refused} == {"archive member refused"}
    with zipfile.ZipFile(hostile) as archive:
        names = [base_name(name) for name in archive.namelist()]
    offered = {name for name in names if images.find(name, [name]).path}
    assert offered == {"good.jpg", "plain.jpg"}
    assert read_image(images.find("x", ["good.jpg"]), LIMIT) == b"good"
    assert len(read_image(images.find("x", ["plain.jpg"]), LIMIT)) == LIMIT + 1
    assert images.files() == [hostile]


def test_a_name_twice_in_a_zip_is_refused_where_it_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"one")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.jpg", b"other")
    images = ImageFiles([path])
    assert [each.detail for each in images.refused] == ["a.jpg: another member of that name follows"]
    assert read_image(images.find("a", ["a.jpg"]), LIMIT) == b"other"


@pytest.mark.parametrize("damage", ["checksum", "stream", "cut", "method", "gone", "encrypted"])
def test_what_cannot_be_read_is_an_os_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "kb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(range(256)) * 40)
        archive.writestr("b.jpg", b"sound")
    content = bytearray(path.read_bytes())
    member, entry = ImageFiles([path]).find("a", ["a.jpg"]), content.rindex(b"a.jpg") - 46
    sound = ImageFiles([path]).find("b", ["b.jpg"])
    if damage == "checksum":
        content[entry + 16] ^= 1
    elif damage == "stream":
        content[36:60] = b"\xff" * 24
    elif damage == "cut":
        content[entry + 20 : entry + 24] = (20).to_bytes(4, "little")  # fewer packed bytes than there are
    elif damage == "method":
        content[entry + 10] = content[8] = 6
    elif damage == "encrypted":
        content[entry + 8] |= 1
        content[6] |= 1
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(OSError, match=r"a\.jpg|No such file"):
        read_image(member, LIMIT)
    if damage != "gone":
        assert read_image(sound, LIMIT) == b"sound"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@example(flips=[(0.9405617078242788, 0)])  # a name that begins with a zero byte is none
def test_whatever_is_damaged_has_a_name(flips: list[tuple[float, int]], tmp_path: Path) -> None:
    """Bytes set at random places: an error for the zip, an OSError for a member, or it is read as it was."""
    path = tmp_path / "kb.zip"
    content = bytes(range(256)) * 2
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("\u00e4.jpg", content)
        archive.writestr("b.jpg", content, zipfile.ZIP_BZIP2)
        archive.writestr("c.jpg", content, zipfile.ZIP_LZMA)
    damaged = bytearray(path.read_bytes())
    for share, value in flips:
        damaged[int(share * len(damaged))] = value
    path = path.with_name(f"{hash(bytes(damaged))}.zip")
    path.write_bytes(damaged)
    try:
        images = ImageFiles([path])
    except UserError:
        return
    for name in ("\u00e4.jpg", "b.jpg", "c.jpg"):
        with contextlib.suppress(OSError):
            assert content.startswith(read_image(images.find(name, [name]), LIMIT))


def test_a_zip_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kb.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"kb\.zip: the zip cannot be read"):
        ImageFiles([tmp_path / "kb.zip"])


def test_the_first_place_wins(tmp_path: Path) -> None:
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb/a.jpg").write_bytes(b"folder")
    with zipfile.ZipFile(tmp_path / "kb.zip", "w") as archive:
        archive.writestr("kb/a.jpg", b"zip")
        archive.writestr("kb/Cafe\u0301.jpg", b"decomposed")
    images = ImageFiles([tmp_path / "kb", tmp_path / "kb.zip", tmp_path / "nowhere"])
    assert read_image(images.find("n", ["a.jpg"]), LIMIT) == b"folder"
    assert read_image(images.find("n", ["Caf%C3%A9.jpg"]), LIMIT) == b"decomposed"
    assert images.files() == [tmp_path / "kb/a.jpg", tmp_path / "kb.zip"]
    assert images.find("n", ["b.jpg"]) == RawImage("n", None)


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "images/deep").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "images/deep/a.jpg").write_bytes(b"a")
    (folder / "images/in.jpg").symlink_to("deep/a.jpg")
    (folder / "images/out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "images/circle.jpg").symlink_to("circle.jpg")
    (folder / "elsewhere").symlink_to(tmp_path)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in ("images/deep/a.jpg", "images/zipped.jpg", "bare.jpg"):
            archive.writestr(name, name)
    paths = ImagePaths(folder)

    def found(name: str) -> bytes | str:
        image = paths.find(name)
        if image is None:
            return "outside"
        return read_image(image, LIMIT) if image.path else "lost"

    assert {name: found(name) for name in ("images/deep/a.jpg", "./images//in.jpg", "images\\deep\\a.jpg")} == {
        "images/deep/a.jpg": b"a",
        "./images//in.jpg": b"a",
        "images\\deep\\a.jpg": b"a",
    }
    assert (found("images/zipped.jpg"), found("images/bare.jpg")) == (b"images/zipped.jpg", b"bare.jpg")
    outside = ["../secret.jpg", str(tmp_path / "secret.jpg"), "images/out.jpg", "elsewhere/secret.jpg", "C:\\a.jpg"]
    assert {found(name) for name in outside} == {"outside"}
    lost = ["images/circle.jpg", "images/none.jpg", "images", "a\x00b", "\ud800.jpg", "x" * 5000, "https://a.b/c.jpg"]
    assert {found(name) for name in lost} == {"lost"}
