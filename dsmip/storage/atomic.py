"""Atomic files: a reader sees the old content or the whole new content, never a part."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsmip.errors import ReportedError, no_room
from dsmip.messages import masked

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; on success it is renamed to `target`, on failure removed.

    The folder of `target` is made when it is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process number: nodes that share the folder have equal ones.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming_full_disk(target.parent):
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        if error.filename == str(temporary):  # a name that tells a user nothing
            error.filename = str(target)
        raise
    finally:
        with suppress(OSError):  # it is not there, or went the way of the error
            temporary.unlink()


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Makes whatever a library raises when a disk is full while it writes into `folder` an OSError that names it."""
    try:
        yield
    except ReportedError:  # has said which disk
        raise
    except Exception as error:
        if (code := no_room(error)) is None:  # torch and safetensors have errors of their own
            raise
        raise OSError(code, os.strerror(code), str(folder)) from error


def write_text(target: Path, text: str) -> None:
    """Writes `text` (UTF-8) atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    write_text(target, json_text(value))


def write_masked_json(target: Path, value: Any) -> None:
    """As `write_json`, without secrets in addresses, which an older version may have stored in what is shown here."""
    write_text(target, masked(json_text(value)))


def json_text(value: Any) -> str:
    """Indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def join_files(files: Iterable[Path], target: Path) -> None:
    """Writes the contents of files one after the other, atomically."""
    with atomic_path(target) as temporary, temporary.open("wb") as joined:
        for file in files:
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, joined, _CHUNK_BYTES)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
