"""Private folders and lock files: what another user may have put into their places is refused, and stays as it is."""

import os
from pathlib import Path

import pytest

from dsmip.errors import UserError
from dsmip.private import is_private_file, lock_file, own_folder, private_folder, user_cache_folder

INSTEAD = "set TMPDIR to another folder"


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def test_a_folder_is_made_closed_and_an_open_one_of_ours_is_closed(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "above" / "made", INSTEAD)
    assert mode(made) == 0o700
    (made / "kept").write_text("kept")
    made.chmod(0o755)
    assert own_folder(made, INSTEAD) == made
    assert mode(made) == 0o755
    assert private_folder(made, INSTEAD) == made
    assert mode(made) == 0o700
    assert (made / "kept").read_text() == "kept"


def test_a_link_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir(mode=0o700)
    for target in (tmp_path / "victim", tmp_path / "nothing"):
        link = tmp_path / "link"
        link.symlink_to(target)
        with pytest.raises(UserError, match=f"^{link}: is a link.*; remove it, or {INSTEAD}$"):
            private_folder(link, INSTEAD)
        link.unlink()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("open_mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, open_mode: int) -> None:
    folder = tmp_path / "open to all"
    folder.mkdir()
    folder.chmod(open_mode)
    with pytest.raises(UserError, match=f"other users may write there.*chmod go-w '{folder}'.*{INSTEAD}"):
        private_folder(folder, INSTEAD)
    assert folder.lstat().st_mode & 0o7777 == open_mode


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(UserError, match=f"^{folder}: belongs to another user .number 65534.; {INSTEAD}$"):
        private_folder(folder, INSTEAD)


def test_a_file_in_a_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="file: is no folder"):
        private_folder(tmp_path / "file", INSTEAD)


def test_a_lock_is_made_closed_and_found_again(tmp_path: Path) -> None:
    path = lock_file(tmp_path / "lock")
    assert mode(path) == 0o600
    assert lock_file(path) == path


def test_no_lock_is_taken_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "soft").symlink_to(victim)
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    (tmp_path / "hard").hardlink_to(victim)
    (tmp_path / "folder").mkdir()
    for name in ("soft", "nowhere", "hard", "folder"):
        with pytest.raises(UserError, match=f"{name}: is a link or no plain file, where a lock belongs; remove it"):
            lock_file(tmp_path / name)
    assert victim.read_text() == "kept"
    assert not (tmp_path / "nothing").exists()


def test_only_a_plain_file_that_we_alone_write_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ours")
    path.chmod(0o644)
    assert is_private_file(path)
    path.chmod(0o664)
    assert not is_private_file(path)
    (tmp_path / "link").symlink_to(path)
    assert not is_private_file(tmp_path / "link")
    assert not is_private_file(tmp_path / "missing")


def test_a_relative_cache_home_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("caches", "./caches", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert user_cache_folder() == tmp_path / ".cache" / "dsmip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert user_cache_folder() == tmp_path / "other" / "dsmip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "here")
    with pytest.raises(UserError, match="no home folder for caches; set XDG_CACHE_HOME"):
        user_cache_folder()


def test_a_system_without_users_numbers_is_told_which_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "getuid")
    with pytest.raises(UserError, match=r"^dsmip runs on Linux, .* and on Windows in WSL$"):
        private_folder(tmp_path / "folder", "")
    assert not (tmp_path / "folder").exists()
