"""Shared feature tables beside other processes: writers, killed ones, readers; lack of room, damage, full disks."""

import os
import time
from pathlib import Path

import pytest

from dsmip.data.table import Table
from dsmip.encoders.shared_tables.tables import SharedTables
from dsmip.errors import UserError, no_room_message
from dsmip.storage.run_storage import LocalRun
from tests.support.encoders import shared_tables
from tests.support.encoders.shared_tables import ORIGIN, killed_writer, make, reading, write_together
from tests.support.full_disk import small_disk, small_files

A, B, C, D, K = (digit * 64 for digit in "abcde")  # keys are digests
ONE_AND_A_HALF = str(6100 / 1e9)  # tables, in gigabytes


@pytest.fixture
def place(tmp_path: Path) -> SharedTables:
    found = SharedTables(LocalRun(tmp_path / "place"))
    assert found.is_writable
    return found


def keys(place: SharedTables) -> list[str]:
    return [each.key for each in place.listed()]


def quiet(line: str) -> None:
    pytest.fail(line)


def test_one_of_several_writers_writes(place: SharedTables, tmp_path: Path) -> None:
    """The others wait, and read what it has written."""
    write_together(place.storage.folder, K, tmp_path / "log", 3)
    assert place.find(K, quiet)
    assert (tmp_path / "log").read_text() == "written\n"


def test_a_killed_writer_leaves_nothing_that_is_read(place: SharedTables) -> None:
    killed_writer(place.storage.folder, K)
    assert place.find(K, quiet) is None
    assert len(list(place.storage.folder.glob(".*.tmp"))) == 1
    path = place.made(K, ORIGIN, shared_tables.write, lambda: None)
    assert len(Table.load(path)) == 1000
    assert not list(place.storage.folder.glob(".*.tmp"))


def test_what_killed_writers_have_left_is_removed(place: SharedTables) -> None:
    killed_writer(place.storage.folder, K)
    assert place.remove_leftovers() == 1000
    assert not list(place.storage.folder.glob(".*.tmp"))


def test_room_is_made_by_what_was_not_used_for_the_longest(
    place: SharedTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.storage.folder
    for key in (A, B, C):
        make(folder, key)
    with reading(folder, A):  # used last now
        pass
    monkeypatch.setenv("DSMIP_FEATURES_GB", ONE_AND_A_HALF)
    assert [each.key for each in place.make_room()] == [B, C]
    assert keys(place) == [A]
    make(folder, D)  # a writer makes room, too, and not by what it has just written
    assert keys(place) == [D]
    assert not [path for path in (folder / ".locks").iterdir() if not path.name.startswith(f"{D}.")]


def test_files_of_somebody_else_are_no_tables(place: SharedTables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may name any folder, that of his weights as well."""
    folder = place.storage.folder
    others = [folder / name for name in ("weights.safetensors", f"{A}-of-mine.safetensors", ".mine.safetensors.tmp")]
    for path in others:
        path.write_bytes(bytes(10_000))
    make(folder, B)
    assert keys(place) == [B]
    monkeypatch.setenv("DSMIP_FEATURES_GB", "0.000001")
    assert [each.key for each in place.make_room()] == [B]
    assert place.remove_leftovers() == 0
    assert all(path.is_file() for path in others)


def test_what_is_in_use_stays(place: SharedTables, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.storage.folder
    for key in (A, B, C):
        make(folder, key)
    monkeypatch.setenv("DSMIP_FEATURES_GB", ONE_AND_A_HALF)
    with reading(folder, B):  # it is listed last, as it was just used
        os.utime(folder / f"{B}.json", (0, 0))
        entry = (folder / f"{B}.json").read_text()
        (folder / f"{B}.json").write_text(entry.replace('"used": ', '"used": 1.0, "was": '))
        assert keys(place)[0] == B
        assert [place.in_use(key) for key in (A, B, C)] == [False, True, False]
        assert [each.key for each in place.make_room()] == [A, C]
        assert len(Table.load(folder / f"{B}.safetensors")) == 1000
    assert not place.in_use(B)
    assert [each.key for each in place.shrink(place.listed(), 0)] == [B]
    assert place.find(B, quiet) is None  # and whoever wants it makes it again
    assert place.made(B, ORIGIN, shared_tables.write, lambda: None).is_file()


def test_without_a_limit_a_small_disk_is_filled_to_nine_tenths(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        place = SharedTables(LocalRun(disk / "place"))
        make(disk / "place", A)
        held = place.listed()[0].num_bytes
        assert place.limit(held) == pytest.approx(0.9 * 2**20, rel=0.05)
        (disk / "other").write_bytes(bytes(950_000))
        make(disk / "place", B)
        assert keys(place) == [B]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "said"),
    [(flipped, "not the SHA-256"), (cut, "bytes instead of"), (Path.unlink, "is missing")],
)
def test_a_damaged_table_is_told_of_and_written_again(place: SharedTables, damage: object, said: str) -> None:
    path, lines = make(place.storage.folder, K), list[str]()
    expected = path.read_bytes()
    damage(path)  # type: ignore[operator]
    assert place.find(K, lines.append) is None
    (line,) = lines
    assert str(path) in line
    assert said in line
    assert "computed again" in line
    assert place.made(K, ORIGIN, shared_tables.write, lambda: None).read_bytes() == expected
    assert place.find(K, quiet) == path


def test_a_copied_table_is_checked_and_taken(place: SharedTables, tmp_path: Path) -> None:
    """Its time of change is no mark."""
    path = make(place.storage.folder, K)
    os.utime(path, (time.time(), time.time()))
    assert place.find(K, quiet) == path
    assert path.stat().st_mtime_ns == 86_400_000_000_000


def test_a_table_without_description_is_written_again(place: SharedTables) -> None:
    """A writer was killed just before the end, or somebody has broken the file."""
    path = make(place.storage.folder, K)
    for content in (None, b"{", b'{"format": 2}'):
        describes = place.storage.folder / f"{K}.json"
        describes.unlink()
        if content is not None:
            describes.write_bytes(content)
        assert place.find(K, quiet) is None
        assert [(each.key, each.entry) for each in place.listed()] == [(K, None)]
        assert place.made(K, ORIGIN, shared_tables.write, lambda: None) == path


def test_a_full_disk_is_named_and_nothing_is_left(place: SharedTables) -> None:
    with small_files(1000), pytest.raises(OSError, match=r"large|space|limit") as caught:
        place.made(K, ORIGIN, shared_tables.write, lambda: None)
    assert str(place.storage.folder) in no_room_message(caught.value, "?")
    assert keys(place) == []
    assert not list(place.storage.folder.glob(f".{K}*"))


def test_a_limit_that_is_no_number_is_a_mistake(place: SharedTables, monkeypatch: pytest.MonkeyPatch) -> None:
    make(place.storage.folder, K)
    monkeypatch.setenv("DSMIP_FEATURES_GB", "many")
    with pytest.raises(UserError, match="DSMIP_FEATURES_GB=many: must be a number of gigabytes above 0"):
        place.make_room()
