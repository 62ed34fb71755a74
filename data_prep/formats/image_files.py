"""Image files of a release, in folders or still in zips: found by base name or by path, read one by one."""

import lzma
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from data_prep.formats.release import Finding, RawImage
from dsmip.errors import UserError

MAX_FILE_BYTES = 1 << 28
MAX_RATIO = 200  # pictures hardly shrink; white ones do, so small members may
_SMALL_BYTES = 1 << 20
_OPEN_ZIPS = 4
_FOLDER, _ZIP = "images/", "images.zip"  # of `ImagePaths`
_KNOWN_PARENTS = 1 << 12
_ENCRYPTED = 0x1
# What zipfile raises for wrong bytes; RuntimeError: encrypted, NotImplementedError (one of them): an unknown method.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def zip_members(path: Path) -> tuple[list[RawImage], list[Finding]]:
    """The files in a zip, named by their paths there, and a finding for each member that is refused.

    Nothing is ever unpacked to a path that a zip names; refused are members that hostile zips are known by.

    Raises:
        UserError: It is no zip, or damaged.
    """
    try:
        archive = _opened_zip(path)
    except (OSError, *_DAMAGED) as error:
        raise UserError(f"{path}: the zip cannot be read: {error}") from error
    members, refused = [], []
    for position, info in enumerate(archive.infolist()):
        if info.is_dir():
            continue
        fault = _fault(info)
        if not fault and archive.getinfo(info.filename) is not info:
            fault = "another member of that name follows"  # a member is opened by its name
        if fault:
            detail = f"{info.filename}: {fault}"
            refused.append(Finding(path.name, position, "archive member refused", "degraded", detail))
        else:
            members.append(RawImage(info.filename, path, info.filename, info.file_size))
    return members, refused


def read_member(path: Path, member: str, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of a member.

    Raises:
        OSError: It is not there, damaged, encrypted, or compressed in an unknown way.
    """
    try:
        with _opened_zip(path).open(member) as stream:
            return stream.read(max_bytes + 1)
    except (KeyError, *_DAMAGED) as error:
        raise OSError(f"{path}: {member}: {error}") from error


def path_fault(name: str) -> str | None:
    """Why a path with slashes of either kind leads out of the folder that it is meant for, or None."""
    name = name.replace("\\", "/")
    if name.startswith("/") or re.match("[A-Za-z]:/", name):
        return "absolute path"
    return "path with .." if ".." in name.split("/") else None


def _fault(info: zipfile.ZipInfo) -> str | None:
    mode = info.external_attr >> 16
    if fault := path_fault(info.filename):
        return fault
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "link" if stat.S_ISLNK(mode) else "no plain file"
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    if info.file_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES} bytes"
    if info.file_size > _SMALL_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return f"shrunk more than {MAX_RATIO} times"
    return None


def _opened_zip(path: Path) -> zipfile.ZipFile:
    status = path.stat()
    return _opened(path, status.st_mtime_ns, status.st_size)


@lru_cache(_OPEN_ZIPS)
def _opened(path: Path, _mtime_ns: int, _size: int) -> zipfile.ZipFile:
    """An open zip, kept open as reading the list of a large one takes seconds; one that changes is opened anew."""
    return zipfile.ZipFile(path)


class ImageFiles:
    """All files of some folders and zips, found by base name; the first of them that has a name wins.

    Args:
        containers: The folders and zips; those that are missing do not count.

    Attributes:
        containers: Those that exist.
        refused: A finding for each member of a zip that is not read; a release delivers them once.

    Raises:
        UserError: A zip is damaged.
    """

    def __init__(self, containers: Sequence[Path]) -> None:
        self.containers = tuple(path for path in containers if path.exists())
        self._found: dict[str, RawImage] = {}
        refused: list[Finding] = []
        for path in self.containers:
            if path.is_dir():
                images = _folder(path)
            else:
                members, faults = zip_members(path)
                images = [replace(member, name=base_name(member.name)) for member in members]
                refused += faults
            for image in images:
                # Archives from some systems hold decomposed names.
                for name in (image.name, unicodedata.normalize("NFC", image.name)):
                    self._found.setdefault(name, image)
        self.refused = tuple(refused)

    def find(self, name: str, candidates: Iterable[str]) -> RawImage:
        """The first candidate, as it is or percent-decoded, that is a file here; folders in a name do not count.

        Args:
            name: What the record calls the image; it stays the name of what is found, or of what is lost.
            candidates: Names that its file may have.
        """
        candidates = list(candidates)
        for candidate in [*candidates, *map(unquote, candidates)]:
            base = base_name(candidate)
            found = self._found.get(base) or self._found.get(unicodedata.normalize("NFC", base))
            if found:
                return RawImage(name, found.path, found.member, found.size)
        return RawImage(name, None)

    def files(self) -> list[Path]:
        """The files that the images are in: a zip, or every file of a folder; in a fixed order."""
        zips = {path for path in self.containers if not path.is_dir()}
        return sorted(zips | {image.path for image in self._found.values() if image.path})


def base_name(name: str) -> str:
    """What follows the last slash of either kind."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def read_image(image: RawImage, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of an image that was found.

    Raises:
        OSError: It cannot be read.
    """
    if image.path is None:
        raise FileNotFoundError(image.name)
    if image.member is None:
        with image.path.open("rb") as stream:
            return stream.read(max_bytes + 1)
    return read_member(image.path, image.member, max_bytes)


def _folder(folder: Path) -> list[RawImage]:
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]
    return [RawImage(name, folder / name, None, size) for name, size in sorted(found)]


class ImagePaths:
    """Images found by path: below a folder, else in its images.zip, whose members are named images/x.jpg or x.jpg.

    Args:
        folder: The release's folder.

    Attributes:
        zips: The zip, if there is one.
        refused: A finding for each member of the zip that is not read; a release delivers them once.

    Raises:
        UserError: The zip is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._root = folder, folder.resolve()
        self._parents: dict[str, bool] = {}
        path = folder / _ZIP
        self.zips = (path,) if path.is_file() else ()
        members, refused = zip_members(path) if self.zips else ([], [])
        self._members = {unicodedata.normalize("NFC", _plain(member.name)): member for member in members}
        self.refused = tuple(refused)

    def find(self, name: str) -> RawImage | None:
        """The image at a path (or what is lost there); None for a path or a link that leads out of the folder."""
        if path_fault(name):
            return None
        plain = _plain(name)
        found = self._file(plain)
        if isinstance(found, int):
            return RawImage(name, self._folder / plain, None, found)
        if found == "outside":
            return None
        plain = unicodedata.normalize("NFC", plain)
        member = self._members.get(plain) or self._members.get(plain.removeprefix(_FOLDER))
        return RawImage(name, member.path, member.member, member.size) if member else RawImage(name, None)

    def _file(self, plain: str) -> int | Literal["outside", "lost"]:
        """The size of the file at a path below the folder, or why it does not count."""
        try:
            if not self._is_inside(os.path.dirname(plain)):
                return "outside"
            path = os.path.join(self._folder, plain)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not Path(path).resolve().is_relative_to(self._root):
                    return "outside"
                status = os.stat(path)
        except (OSError, ValueError, RuntimeError):
            return "lost"  # no file, no name that a file can have, or links in a circle
        return status.st_size if stat.S_ISREG(status.st_mode) else "lost"

    def _is_inside(self, parent: str) -> bool:
        """Whether a folder, all links followed, is in the release's; most images share one."""
        if parent not in self._parents:
            if len(self._parents) == _KNOWN_PARENTS:
                self._parents.clear()
            self._parents[parent] = (self._folder / parent).resolve().is_relative_to(self._root)
        return self._parents[parent]


def _plain(name: str) -> str:
    """A path without needless dots and slashes."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
