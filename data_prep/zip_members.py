"""Zips of pictures, read where they are: which members are offered, which are refused by name, and their bytes."""

import lzma
import re
import stat
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from data_prep.pictures import MAX_FILE_BYTES
from data_prep.release import Finding, RawPicture
from dsmip.errors import UserError

MAX_RATIO = 200  # pictures hardly shrink; white ones do, so small members may
_SMALL_BYTES = 1 << 20
_OPEN_ZIPS = 4
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


def zip_members(path: Path) -> tuple[list[RawPicture], list[Finding]]:
    """The files in a zip, named by their paths there, and a finding for each member that is refused.

    Nothing is ever unpacked to a path that a zip names; refused are members that such a zip is known by.

    Raises:
        UserError: it is no zip, or damaged.
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
            members.append(RawPicture(info.filename, path, info.filename, info.file_size))
    return members, refused


def read_member(path: Path, member: str, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of a member.

    Raises:
        OSError: it is not there, damaged, encrypted, or compressed in an unknown way.
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
    """Kept open, as reading the list of a large zip takes seconds; a zip that changes is opened anew."""
    return zipfile.ZipFile(path)
