"""The storage of a run: files by name, in a folder that all nodes see or in an object store, with copies on each node.

Names are relative, with slashes (`text/part.json`). Files are read and written in the storage's `folder`, because
tables are memory-mapped and files are replaced whole. For a `LocalRun` that is all; a
`dsmip.storage.remote_run.RemoteRun` fetches and sends:

    refresh()             before reading: all small files
    pull(name)            before reading: a large file, or all below a folder
    with atomic(name)     writing: the store has the whole file before anybody here sees it
    push(name)            what other code wrote into the folder

Code that works on a run calls these wherever they are needed and never asks which kind of storage it has.
`dsmip.storage.locations.open_run_storage` opens what lies at a location.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmip.storage.atomic import atomic_path, json_text

STAMP = "run.json"  # written once: another one at the same location is another run's


class RunStorage(ABC):
    """The files of a run, or of a folder of it. `str()` is what a user calls it."""

    @property
    @abstractmethod
    def location(self) -> str:
        """Opens the same storage in any process on any node."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the files are worked on, on this node."""

    @abstractmethod
    def __truediv__(self, name: str) -> "RunStorage":
        """The storage of a folder of this one."""

    @abstractmethod
    def refresh(self) -> None:
        """Brings the small files (JSON, YAML, text) up to date."""

    @abstractmethod
    def pull(self, *names: str) -> None:
        """Brings files, or all below folders, up to date; what the store does not have is deleted here."""

    @abstractmethod
    def atomic(self, name: str) -> AbstractContextManager[Path]:
        """Yields a temporary path; when the block ends the file appears under its name, in the store first."""

    @abstractmethod
    def push(self, *names: str) -> None:
        """Sends files, or all below folders, that have changed; JSON files, which say what is complete, last."""

    @abstractmethod
    def replace(self, name: str) -> None:
        """`push` of a folder; then deletes in the store what is not in it here."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file or a folder, if it is there."""

    @abstractmethod
    def glob(self, pattern: str) -> list[str]:
        """Names of files and folders, as the store has them, in order."""

    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Bytes by file or folder directly in this storage."""

    @abstractmethod
    def arrow_filesystem(self) -> tuple[str, Any]:
        """The storage for Ray: a path, and the pyarrow file system that it is of (None: the nodes' own)."""

    def write_text(self, name: str, text: str) -> None:
        """Writes `text` (UTF-8) atomically."""
        with self.atomic(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as indented JSON with sorted keys, atomically."""
        self.write_text(name, json_text(value))


@dataclass(frozen=True)
class LocalRun(RunStorage):
    """A folder that every node sees under the same path: nothing is fetched or sent."""

    path: Path

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path.absolute()}  # another process works in another folder

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "LocalRun":
        return LocalRun(self.path / name)

    @property
    def location(self) -> str:
        return str(self.path.resolve())

    @property
    def folder(self) -> Path:
        return self.path

    def refresh(self) -> None:
        """Does nothing: files are read in place."""

    def pull(self, *names: str) -> None:
        """Does nothing: files are read in place."""

    def atomic(self, name: str) -> AbstractContextManager[Path]:
        return atomic_path(self.path / name)

    def push(self, *names: str) -> None:
        """Does nothing: files are written in place."""

    def replace(self, name: str) -> None:
        """Does nothing: files are written in place."""

    def delete(self, name: str) -> None:
        target = self.path / name
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    def glob(self, pattern: str) -> list[str]:
        return sorted(found.relative_to(self.path).as_posix() for found in self.path.glob(pattern))

    def sizes(self) -> Mapping[str, int]:
        return {entry.name: _num_bytes(entry) for entry in sorted(self.path.iterdir())}

    def arrow_filesystem(self) -> tuple[str, Any]:
        return self.location, None


def _num_bytes(path: Path) -> int:
    """Bytes below a path; files that vanish meanwhile count nothing."""
    total = 0
    for each in [path, *path.rglob("*")]:
        try:
            total += each.lstat().st_size if each.is_file() else 0
        except OSError:
            continue
    return total
