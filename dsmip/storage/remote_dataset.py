"""The files of a dataset in an object store: fetched whole when first needed, and kept on this node."""

import hashlib
import posixpath
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsmip.errors import UserError
from dsmip.storage.cache import LIMIT, checked_copy, data_cache, fresh_folder
from dsmip.storage.dataset_storage import MANIFEST_FILE, MISSING, Ahead, LocalDataset, StoredFile
from dsmip.storage.object_store import ObjectStore, is_uri

Result = TypeVar("Result")

_AT_ONCE = 4  # files that are fetched ahead side by side
_TRIES = 5


@dataclass(frozen=True, slots=True)
class RemoteDataset:
    """The storage of the dataset at a URI. Opens connections when they are needed, in each process.

    It belongs to one version of the dataset: copies of another version lie in another folder.

    Attributes:
        location: The URI, without a slash at its end.
        folder: Where the copies of its files lie.
    """

    location: str
    folder: Path

    def address(self, name: str) -> str:
        return self._store.address(name)

    def read(self, name: str) -> bytes | None:
        return self._store.read(name)

    def use(self, file: StoredFile, opener: Callable[[Path], Result]) -> Result:
        for _ in range(_TRIES):
            path = self._fetch(file)
            with suppress(FileNotFoundError):  # another process made room since
                return opener(path)
        raise UserError(f"{self.folder}: the cache is too small: files go before they are read; raise {LIMIT}")

    @contextmanager
    def ahead(self) -> Iterator[Ahead]:
        waiting: queue.SimpleQueue[StoredFile | None] = queue.SimpleQueue()
        closed = threading.Event()

        def fetch_all() -> None:
            while (file := waiting.get()) is not None and not closed.is_set():
                with suppress(Exception):  # whoever reads the file fetches it again, and hears of it
                    self._fetch(file)

        threads: list[threading.Thread] = []

        def ask(files: Sequence[StoredFile]) -> None:
            if files and not threads:
                # Daemons: a fetch that hangs keeps no process from ending.
                threads.extend(threading.Thread(target=fetch_all, daemon=True) for _ in range(_AT_ONCE))
                for thread in threads:
                    thread.start()
            for file in files:
                waiting.put(file)

        try:
            yield ask
        finally:
            closed.set()
            for _ in threads:
                waiting.put(None)

    @contextmanager
    def fresh(self, name: str) -> Iterator[Path]:
        with fresh_folder() as folder:
            path = folder / Path(name).name
            with suppress(FileNotFoundError):
                self._store.get(name, path)
            yield path

    def children(self, name: str) -> list[str]:
        return self._store.children(name)

    def check_sizes(self, files: Sequence[StoredFile]) -> None:
        """Does nothing: every file is checked when it is fetched; all of them here would keep each worker waiting."""

    def send(self, name: str) -> None:
        self._store.put(self.folder / name, name)

    def remove(self, name: str) -> None:
        LocalDataset(self.folder).remove(name)
        self._store.remove_folder(name)

    def relative(self, address: str) -> str | Path:
        return address if is_uri(address) else _resolved(self.location, address)

    @property
    def _store(self) -> ObjectStore:
        return ObjectStore(self.location)

    def _fetch(self, file: StoredFile) -> Path:
        """The checked copy of a file; fetched when there is none."""
        address = self.address(file.path)
        try:
            return checked_copy(
                self.folder / file.path, file, address, lambda target: self._store.get(file.path, target)
            )
        except FileNotFoundError as error:
            raise UserError(f"{address}: the file is missing; prepare the dataset again") from error
        except OSError as error:
            what = f"{error.filename or self.folder}: {error.strerror or error}"
            raise UserError(f"{what}, while {address} was copied here; make room, or set DSMIP_CACHE") from error


def open_remote_dataset(uri: str) -> tuple[RemoteDataset, bytes]:
    """The storage of the dataset at a URI, and its manifest's content.

    Raises:
        UserError: There is none, or the store cannot be read.
    """
    uri = uri.rstrip("/")
    content = ObjectStore(uri).read(MANIFEST_FILE)
    if content is None:
        raise UserError(f"{uri}: no such bucket, or {MISSING}")
    return RemoteDataset(uri, data_cache() / hashlib.sha256(content).hexdigest()[:32]), content


def _resolved(uri: str, address: str) -> str:
    """The URI of an address relative to another one.

    Raises:
        UserError: It leads out of the bucket: whoever made the view chose it, not whoever reads it.
    """
    scheme, _, path = uri.partition("://")
    bucket = path.partition("/")[0]
    found = posixpath.normpath(posixpath.join(path, address))
    if not f"{found}/".startswith(f"{bucket}/"):
        raise UserError(f"{uri}: is a view of '{address}', which leads out of its bucket; make it of a whole URI")
    return f"{scheme}://{found}"
