"""Image files of a release, in folders or still in zips: found by what records call them, read one by one."""

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from data_prep.formats.image_index import ImageFile, ImageIndex, plain_path
from data_prep.formats.release import Finding, RawImage
from dsmip.data.manifest import MAX_FILE_BYTES
from dsmip.errors import UserError

MAX_RATIO = 200  # pictures hardly shrink; white ones do, so small members may
_SMALL_BYTES = 1 << 20
_OPEN_ZIPS = 4
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_ZIP = "images.zip"  # of `ImagePaths`
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
        if info.filename.endswith("/"):  # `is_dir` asks for the last letter of a name, and damage can take them all
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
    if not info.filename:
        return "no name"
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


def _files_below(folder: Path, *, follow: bool) -> list[ImageFile]:
    """The files below a folder, sorted; `follow`: through links, too."""
    found: list[ImageFile] = []
    entered: set[tuple[int, int]] = set()  # links can make circles

    def enter(path: str, prefix: str) -> None:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_dir(follow_symlinks=follow):
                if not entry.name.startswith("."):
                    enter(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=follow):
                found.append(ImageFile(prefix + entry.name, folder, None, entry.stat().st_size))

    enter(str(folder), "")
    return found


def _zip_files(path: Path) -> tuple[list[ImageFile], list[Finding]]:
    members, refused = zip_members(path)
    return [ImageFile(plain_path(one.name), path, one.member, one.size) for one in members], refused


class ImageFiles:
    """All files of some folders and zips, found by what records call them; the first of them that has a path wins.

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
        listed: list[list[ImageFile]] = []
        refused: list[Finding] = []
        for path in self.containers:
            if path.is_dir():
                listed.append(_files_below(path, follow=True))
            else:
                files, faults = _zip_files(path)
                listed.append(files)
                refused += faults
        self.refused = tuple(refused)
        self._paths = {file.on_disk for files in listed for file in files}
        self._index = ImageIndex(listed)

    def find(self, name: str, candidates: Iterable[str]) -> RawImage:
        """The file that the first candidate fits, as it is or percent-decoded; see `data_prep.formats.image_index`.

        Args:
            name: What the record calls the image; it stays the name of what is found, or of what is lost.
            candidates: Paths that its file may have.
        """
        return self._index.find(name, candidates)

    def files(self) -> list[Path]:
        """The files that the images are in: a zip, or every file below a folder; in a fixed order."""
        return sorted(self._paths | {path for path in self.containers if not path.is_dir()})


def base_name(name: str) -> str:
    """What follows the last slash of either kind."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def folder_and_base(name: str) -> tuple[str, str]:
    """A path's folder with its slash, and its base name; of an address, whose folders no disk has, the latter alone."""
    base = base_name(name)
    return ("" if "://" in name else name[: len(name) - len(base)]), base


def file_of(image: RawImage | None) -> str | None:
    """What tells the file of an image from others: where it lies, of a lost one its base name."""
    if image is None:
        return None
    return f"{image.path}:{image.member or ''}" if image.path else base_name(image.name)


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


def where_images_lie(folder: Path, name: str) -> str:
    """Where below a folder a file of a name that was not found is, or else where images lie; in words."""
    base = plain_path(unquote(base_name(name))).casefold()
    wanted = {base, f"{base.split('.')[0]}.jpg"}
    by_folder: Counter[str] = Counter()
    for file in _files_below(folder, follow=False):
        path = Path(file.path)
        if path.name.casefold() in wanted:
            return f"a file of that name is {file.path}"
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            by_folder[path.parent.as_posix()] += 1
    if not by_folder:
        return f"there is no picture in {folder}"
    ((most, count),) = by_folder.most_common(1)
    lie = f"picture{' lies' if count == 1 else 's lie'}"
    return f"{count} {lie} in {folder if most == '.' else most}, but none of that name"


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
        self._zipped, refused = _zip_files(path) if self.zips else ([], [])
        self.refused = tuple(refused)

    def find(self, name: str) -> RawImage | None:
        """The image at a path (or what is lost there); None for a path or a link that leads out of the folder.

        What is not there as it is written is matched by the rule of `data_prep.formats.image_index`.
        """
        if path_fault(name):
            return None
        plain = plain_path(name)
        found = self._file(plain)
        if isinstance(found, int):
            return RawImage(name, self._folder / plain, None, found)
        return None if found == "outside" else self._index.find(name, [name])

    @cached_property
    def _index(self) -> ImageIndex:
        """Of the folder and the zip: made when something is not there as it is written."""
        return ImageIndex([_files_below(self._folder, follow=False), self._zipped])

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
