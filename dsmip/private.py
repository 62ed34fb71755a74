"""Private folders and files: ours, closed to others, no link; what somebody else may have put there is refused by name.

In a place where others write too, as the temporary folder is, a folder, a file or a link of a name that we use may be
theirs. Nothing is written, read or deleted through it. What is looked at is the last part of a path: who names a place
by a link above it, as TMPDIR may be one, means that. Caches, locks and `dsmip.units.text_unit_library` stand on this.
"""

import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from dsmip.errors import UserError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path, instead: str) -> Path:
    """A folder that only this user can look into: made with mode 0700, or found; it is closed if others may read it.

    Args:
        path: The folder; those above it are made when they are missing.
        instead: What a user can do besides removing it, for the message: "set TMPDIR to another folder".

    Returns:
        `path`.

    Raises:
        UserError: There is a link, no folder, another user's folder, or one that others may write to.
    """
    own_folder(path, instead)
    if os.lstat(path).st_mode & _OTHERS:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchmod(folder, 0o700)
        finally:
            os.close(folder)
    return path


def own_folder(path: Path, instead: str) -> Path:
    """As `private_folder`, but others may read what is there already: for folders that a user has named."""
    user = user_number()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise UserError(f"{path}: is a link, which another user may have made; remove it, or {instead}")
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is no folder; remove it, or {instead}")
    if found.st_uid != user:
        raise UserError(f"{path}: belongs to another user (number {found.st_uid}); {instead}")
    if found.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"{path}: other users may write there (mode {stat.S_IMODE(found.st_mode):o}), so what it holds may be "
            f"theirs; remove it, or look into it and then run chmod go-w {shlex.quote(str(path))}, or {instead}"
        )
    return path


def lock_file(path: Path) -> Path:
    """An empty file for a lock: made exclusively with mode 0600, or found; its folder must be there.

    Locks empty the file that they open, so a link would empty another one. Whose the file is does not matter: a data
    directory may lie on a server that gives all files one owner.

    Returns:
        `path`.

    Raises:
        UserError: There is a link, or something else than a file.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))
    with suppress(FileNotFoundError):  # another process has just removed it with what it locked
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UserError(f"{path}: is a link or no plain file, where a lock belongs; remove it")
    return path


def is_private_file(path: Path) -> bool:
    """Whether there is a file of ours, no link, that nobody else may write to."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    is_file = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return is_file and found.st_uid == user_number() and not found.st_mode & _OTHERS_WRITE


def user_number() -> int:
    """This user's number.

    Raises:
        UserError: The system has none: what is private cannot be told there.
    """
    if not hasattr(os, "getuid"):
        raise UserError("dsmip runs on Linux, on macOS as far as its packages do, and on Windows in WSL")
    return os.getuid()


def user_cache_folder() -> Path:
    """The folder `dsmip` among this user's caches: in XDG_CACHE_HOME, else in ~/.cache.

    A relative XDG_CACHE_HOME is passed over, as the XDG Base Directory Specification has it.

    Raises:
        UserError: This user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "dsmip"
    with suppress(RuntimeError):
        if (home := Path.home()).is_absolute():
            return home / ".cache" / "dsmip"
    raise UserError("this user has no home folder for caches; set XDG_CACHE_HOME to a full path")
