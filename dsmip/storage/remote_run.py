"""The storage of a run in an object store, with a copy on this node.

<cache>/runs/<hash of the address>/files/     the copy: what was needed here, and what was made here
<cache>/runs/<hash of the address>/versions/  by file: which version of the store's it is, and that it is unchanged

The store is the truth. What is made here is sent before it appears here, so a killed process leaves nothing in the
copy that the store has not (but for what is written in place and sent later: checkpoints of a trial, progress). A run
that was deleted in the store and made anew shares nothing with the old one's copy.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsmip.private import lock_file
from dsmip.storage.atomic import atomic_path, write_text
from dsmip.storage.object_store import ObjectStore, StoredObject, private_cache
from dsmip.storage.run_storage import STAMP, RunStorage

_SMALL = (".json", ".yaml", ".txt")
_NOT_BELOW = {"", ".", ".."}  # a store takes any text for a name; a folder would lead out of the copy
_NOT_READ = "tune/ray/"  # what Tune notes for itself
_AT_ONCE = 8  # transfers


@dataclass(frozen=True)
class RemoteRun(RunStorage):
    """The storage of a run in an object store, or of a folder of it.

    Attributes:
        uri: The run's address.
        below: The folder of the run, with a slash at its end; "" for the run itself.
    """

    uri: str
    below: str = ""

    def __str__(self) -> str:
        return f"{self.uri}/{self.below}".rstrip("/")

    def __truediv__(self, name: str) -> "RemoteRun":
        return RemoteRun(self.uri, f"{self.below}{name}/")

    @property
    def location(self) -> str:
        return str(self)

    @property
    def folder(self) -> Path:
        return self._home / "files" / self.below

    def refresh(self) -> None:
        known = dict(self._versions())  # before the store is asked: what comes meanwhile is not taken for deleted
        found = self._found("")
        if not self.below and known.get(STAMP) != found.get(STAMP):
            known, found = self._cleared()
        for name in known.keys() - found.keys():
            self._forget(name)
        small = {name for name in found if name.endswith(_SMALL) and not f"{self.below}{name}".startswith(_NOT_READ)}
        self._fetch({name: found[name] for name in small})

    def _cleared(self) -> tuple[dict[str, str], dict[str, str]]:
        """Deletes the copy of another run at this address; returns the versions here and in the store after that."""
        # many start at once on a new node; one of them clears up
        with FileLock(lock_file(self._home.with_suffix(".lock"))):
            known, found = dict(self._versions()), self._found("")
            if STAMP in known and known[STAMP] != found.get(STAMP):
                shutil.rmtree(self._home, ignore_errors=True)
                known = {}
            if STAMP in found:
                self._fetch({STAMP: found[STAMP]})
        return known, found

    def pull(self, *names: str) -> None:
        for name in names:
            here = self._files_below(name)
            found = self._found(name)
            for gone in here - found.keys():
                self._forget(gone)
            self._fetch(found)

    def atomic(self, name: str) -> AbstractContextManager[Path]:
        return self._sent_first(name)

    @contextmanager
    def _sent_first(self, name: str) -> Iterator[Path]:
        with atomic_path(self.folder / name) as temporary:
            yield temporary
            version = self._store.put(temporary, name)
        self._note(name, version)

    def push(self, *names: str) -> None:
        files = {each for name in names for each in self._files_below(name)}
        for name in sorted(files, key=lambda each: (each.endswith(".json"), each)):
            state = _state(self.folder / name)
            if self._noted(name)[1] != state:
                self._note(name, self._store.put(self.folder / name, name), state)

    def replace(self, name: str) -> None:
        self.push(name)
        surplus = self._found(name).keys() - self._files_below(name)
        for gone in sorted(surplus, key=lambda each: (not each.endswith(".json"), each)):  # complete no more
            self._remove(gone)

    def delete(self, name: str) -> None:
        for each in self._found(name):
            self._remove(each)
        for each in self._files_below(name):
            self._forget(each)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def glob(self, pattern: str) -> list[str]:
        return self._store.glob(pattern)

    def sizes(self) -> Mapping[str, int]:
        total: dict[str, int] = {}
        for name, stored in self._objects("").items():
            entry = name.partition("/")[0]
            total[entry] = total.get(entry, 0) + stored.size
        return dict(sorted(total.items()))

    def arrow_filesystem(self) -> tuple[str, Any]:
        return self._store.arrow_filesystem()

    @property
    def _home(self) -> Path:
        return private_cache("runs") / hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    @property
    def _store(self) -> ObjectStore:
        return ObjectStore(str(self))

    def _objects(self, name: str) -> dict[str, StoredObject]:
        """A file, or all files below a folder, as the store has them, by name."""
        try:
            found = self._store.objects(name)
        except FileNotFoundError:
            return {}
        return {each: stored for each, stored in found.items() if not _NOT_BELOW & {*each.split("/")}}

    def _found(self, name: str) -> dict[str, str]:
        """The versions that the store has of a file, or of all files below a folder, by name."""
        return {each: stored.version for each, stored in self._objects(name).items()}

    def _files_below(self, name: str) -> set[str]:
        """Finished files here: `name`, or all below it."""
        path = self.folder / name
        found = path.rglob("*") if path.is_dir() else [path]
        names = {each.relative_to(self.folder).as_posix() for each in found if each.is_file()}
        return {each for each in names if not f"/{each}".count("/.")}  # hidden ones are being written

    def _fetch(self, versions: Mapping[str, str]) -> None:
        wanted = {name: version for name, version in versions.items() if not self._is_here(name, version)}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: self._fetch_one(name, wanted[name]), wanted))

    def _fetch_one(self, name: str, version: str) -> None:
        lock = self._note_path(name).with_name(f".{Path(name).name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_file(lock)):  # several workers of a node ask for the same table
            if self._is_here(name, version):
                return
            try:
                with atomic_path(self.folder / name) as temporary:
                    self._store.get(name, temporary)
            except FileNotFoundError:
                return  # deleted since it was listed
            self._note(name, version)

    def _remove(self, name: str) -> None:
        self._store.remove(name)
        self._forget(name)

    def _is_here(self, name: str, version: str) -> bool:
        return self._noted(name)[0] == version and (self.folder / name).is_file()

    def _versions(self) -> Iterable[tuple[str, str]]:
        """The noted versions, by name."""
        root = self._note_path("")
        with suppress(FileNotFoundError):  # another process is clearing up
            for path in root.rglob("*"):
                if path.is_file() and not path.name.startswith("."):
                    name = path.relative_to(root).as_posix()
                    yield name, self._noted(name)[0]

    def _note_path(self, name: str) -> Path:
        return self._home / "versions" / f"{self.below}{name}"

    def _noted(self, name: str) -> tuple[str, str]:
        """The store's version of the file here, and the file's state then; empty when there is none."""
        try:
            version, _, state = self._note_path(name).read_text(encoding="utf-8").partition("\n")
        except (OSError, ValueError):
            return "", ""
        return version, state

    def _note(self, name: str, version: str, state: str | None = None) -> None:
        write_text(self._note_path(name), f"{version}\n{_state(self.folder / name) if state is None else state}")

    def _forget(self, name: str) -> None:
        self._note_path(name).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)


def _state(path: Path) -> str:
    """Differs when the file here was written again."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
