"""The storage of a dataset: its files by name, in a folder or in an object store with copies on this node.

Names are paths below the dataset, with slashes. Whoever reads asks for an open file; whether it had to be fetched is
settled here and in `dsmip.storage.remote_dataset`.
`dsmip.storage.locations.open_dataset_storage` opens what lies at a location.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from dsmip.errors import UserError
from dsmip.storage.object_store import is_uri

MANIFEST_FILE = "manifest.json"
MISSING = f"no {MANIFEST_FILE}, so this is no complete dataset; prepare it (again)"

Result = TypeVar("Result")


class StoredFile(Protocol):
    """A file that a manifest names.

    Attributes:
        path: Below the dataset's folder.
        bytes: Its size; None when the manifest does not say.
        sha256: Of its content, in hexadecimal.
    """

    @property
    def path(self) -> str: ...

    @property
    def bytes(self) -> int | None: ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A `StoredFile` that is no shard."""

    path: str
    sha256: str
    bytes: int | None = None


Ahead = Callable[[Sequence[StoredFile]], None]


class DatasetStorage(Protocol):
    """The files of one dataset. It pickles, for other processes of this node.

    Attributes:
        location: What another node opens the dataset by.
        folder: Where the files, or their copies, lie on this node.
    """

    @property
    def location(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    def address(self, name: str) -> str:
        """A file's name for messages."""
        ...

    def read(self, name: str) -> bytes | None:
        """The present content of a small file; None when there is none."""
        ...

    def use(self, file: StoredFile, opener: Callable[[Path], Result]) -> Result:
        """What `opener` makes of a file's path on this node; what it has opened stays readable.

        Raises:
            UserError: The file is missing or, from a store, not what the manifest says.
        """
        ...

    def ahead(self) -> AbstractContextManager[Ahead]:
        """A function that has files fetched in the background; nothing more is fetched after the context."""
        ...

    def fresh(self, name: str) -> AbstractContextManager[Path]:
        """The file as it is now, not a copy made before; there is nothing at the path when it is missing."""
        ...

    def children(self, name: str) -> list[str]:
        """Names of the files and folders directly in a folder; none when there is no such folder."""
        ...

    def check_sizes(self, files: Sequence[StoredFile]) -> None:
        """Checks that files are there in their sizes, where that can be seen at once.

        Raises:
            UserError: A file is missing, of a wrong size, or closed to this user.
        """
        ...

    def send(self, name: str) -> None:
        """Puts a file that was written below `folder` where all nodes see it."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if there."""
        ...

    def relative(self, address: str) -> str | Path:
        """The location of another dataset, named relative to this one's or by a URI of its own."""
        ...


@dataclass(frozen=True, slots=True)
class LocalDataset:
    """A dataset directory on a disk that all nodes see: everything is read in place."""

    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder.resolve())

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def use(self, file: StoredFile, opener: Callable[[Path], Result]) -> Result:
        path = self.folder / file.path
        try:
            return opener(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: the file is missing; prepare the dataset again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

    def ahead(self) -> AbstractContextManager[Ahead]:
        return nullcontext(lambda files: None)

    def fresh(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.folder / name)

    def children(self, name: str) -> list[str]:
        path = self.folder / name
        return sorted(each.name for each in path.iterdir()) if path.is_dir() else []

    def check_sizes(self, files: Sequence[StoredFile]) -> None:
        for file in files:
            path = self.folder / file.path
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise UserError(f"{path}: the file is missing; prepare the dataset again")
            if file.bytes not in (None, found):
                raise UserError(f"{path}: has {found} bytes instead of {file.bytes}; prepare the dataset again")
            if not os.access(path, os.R_OK):
                raise UserError(f"{path}: this user may not read it; open the dataset's files to its readers")

    def send(self, name: str) -> None:
        """Does nothing: files are written in place."""

    def remove(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def relative(self, address: str) -> str | Path:
        return address if is_uri(address) else self.folder / address


def open_file(files: DatasetStorage, file: StoredFile) -> BinaryIO:
    """A file of the dataset, open for reading; whoever asks closes it."""
    return files.use(file, _open)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")
