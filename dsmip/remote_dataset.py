"""The files of a dataset in an object store: fetched whole when first needed, and kept on this node."""

import glob
import hashlib
import posixpath
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsmip.cache import LIMIT, checked_copy, data_cache, fresh_folder
from dsmip.dataset_storage import MANIFEST_FILE, MISSING, Ahead, LocalDataset, StoredFile
from dsmip.errors import UserError
from dsmip.object_store import attempt, filesystem, is_uri, join

Result = TypeVar("Result")

_AT_ONCE = 4  # files that are fetched ahead side by side
_TRIES = 5


@dataclass(frozen=True, slots=True)
class RemoteDataset:
    """The dataset at a URI; folder: the copies of its files. Opens connections when they are needed, in each process.

    It belongs to one version of the dataset: copies of another version lie in another folder.
    """

    location: str
    folder: Path

    def address(self, name: str) -> str:
        return join(self.location, name)

    def read(self, name: str) -> bytes | None:
        return _read(self.address(name))

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
                self._download(name, path)
            yield path

    def children(self, name: str) -> list[str]:
        system, path = filesystem(self.address(name))
        try:
            found: list[str] = attempt(self.address(name), lambda: system.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(each.rstrip("/")) for each in found if each.rstrip("/") != path)

    def check_sizes(self, files: Sequence[StoredFile]) -> None:
        """Every file is checked when it is fetched; to ask for all of them here would keep each worker waiting."""

    def send(self, name: str) -> None:
        system, path = filesystem(self.address(name))
        attempt(self.address(name), lambda: system.put_file(str(self.folder / name), path))

    def remove(self, name: str) -> None:
        LocalDataset(self.folder).remove(name)
        system, path = filesystem(self.address(name))
        with suppress(FileNotFoundError):
            attempt(self.address(name), lambda: system.rm(glob.escape(path), recursive=True))

    def relative(self, address: str) -> str | Path:
        return address if is_uri(address) else _resolved(self.location, address)

    def _fetch(self, file: StoredFile) -> Path:
        address = self.address(file.path)
        try:
            return checked_copy(
                self.folder / file.path, file, address, lambda target: self._download(file.path, target)
            )
        except FileNotFoundError as error:
            raise UserError(f"{address}: the file is missing; prepare the dataset again") from error
        except OSError as error:
            what = f"{error.filename or self.folder}: {error.strerror or error}"
            raise UserError(f"{what}, while {address} was copied here; make room, or set DSMIP_CACHE") from error

    def _download(self, name: str, target: Path) -> None:
        system, path = filesystem(self.address(name))
        attempt(self.address(name), lambda: system.get_file(path, str(target)))


def open_remote_dataset(uri: str) -> tuple[RemoteDataset, bytes]:
    """The dataset at a URI and its manifest's content.

    Raises:
        UserError: there is none, or the store cannot be read.
    """
    uri = uri.rstrip("/")
    content = _read(join(uri, MANIFEST_FILE))
    if content is None:
        raise UserError(f"{uri}: no such bucket, or {MISSING}")
    return RemoteDataset(uri, data_cache() / hashlib.sha256(content).hexdigest()[:32]), content


def _read(uri: str) -> bytes | None:
    system, path = filesystem(uri)
    try:
        content: bytes = attempt(uri, lambda: system.cat_file(path))
    except FileNotFoundError:
        return None
    return content


def _resolved(uri: str, address: str) -> str:
    """Raises UserError for an address out of the bucket: whoever made the view chose it, not whoever reads it."""
    scheme, _, path = uri.partition("://")
    bucket = path.partition("/")[0]
    found = posixpath.normpath(posixpath.join(path, address))
    if not f"{found}/".startswith(f"{bucket}/"):
        raise UserError(f"{uri}: is a view of '{address}', which leads out of its bucket; make it of a whole URI")
    return f"{scheme}://{found}"
