"""The folder of a file that a command makes, here or in an object store: small files by name, and the large one."""

import posixpath
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol

from dsmip.storage.atomic import atomic_path
from dsmip.storage.locations import local_path
from dsmip.storage.object_store import ObjectStore


class OutputFolder(Protocol):
    """Files by names with slashes; a reader sees none that is not whole."""

    def children(self, name: str) -> list[str]:
        """Names in a folder of it; none when it is missing."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's content; None when there is none."""
        ...

    def open(self, name: str) -> BinaryIO | None:
        """A file, open for reading; None when there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        ...

    def made(self, name: str) -> AbstractContextManager[Path]:
        """Yields a path to write a large file at; when the block ends it appears under its name."""
        ...

    def remove(self, name: str) -> None:
        """Removes a folder of it, if it is there."""
        ...


@dataclass(frozen=True)
class FolderHere:
    """A folder of this machine."""

    path: Path

    def children(self, name: str) -> list[str]:
        folder = self.path / name
        return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []

    def read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def open(self, name: str) -> BinaryIO | None:
        path = self.path / name
        return path.open("rb") if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        with atomic_path(self.path / name) as temporary:
            temporary.write_bytes(content)

    def made(self, name: str) -> AbstractContextManager[Path]:
        return atomic_path(self.path / name)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)


@dataclass(frozen=True)
class FolderInStore:
    """A folder of an object store."""

    store: ObjectStore

    def children(self, name: str) -> list[str]:
        return self.store.children(name)

    def read(self, name: str) -> bytes | None:
        return self.store.read(name)

    def open(self, name: str) -> BinaryIO | None:
        try:
            return self.store.open(name)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self.store.write(name, content)

    @contextmanager
    def made(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / posixpath.basename(name)
            yield path
            self.store.put(path, name)

    def remove(self, name: str) -> None:
        self.store.remove_folder(name)


def open_output(location: str | Path) -> tuple[OutputFolder, str]:
    """The folder that a file at a path or URI is to be in, and its name there.

    Raises:
        UserError: It is an address that nothing can open.
    """
    path = local_path(location)
    if path is not None:
        return FolderHere(path.parent), path.name
    folder, _, name = str(location).rpartition("/")
    return FolderInStore(ObjectStore(folder)), name
