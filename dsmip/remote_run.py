"""A run in an object store, with a copy on this node.

<cache>/runs/<hash of the address>/files/     the copy: what was needed here, and what was made here
<cache>/runs/<hash of the address>/versions/  by file: which version of the store's it is, and that it is unchanged

The store is the truth. What is made here is sent before it appears here, so a killed process leaves nothing in the
copy that the store has not (but for what is written in place and sent later: checkpoints of a trial, progress). A run
that was deleted in the store and made anew shares nothing with the old one's copy.
"""

import glob
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pyarrow.fs import FSSpecHandler, PyFileSystem

from dsmip.atomic import atomic_path, write_text
from dsmip.errors import UserError
from dsmip.object_store import attempt, cache_folder, filesystem
from dsmip.run_storage import RunStorage

Result = TypeVar("Result")
STAMP = "run.json"  # written once: another one in the store is another run's
_SMALL = (".json", ".yaml", ".txt")
_NOT_BELOW = {"", ".", ".."}  # a store takes any text for a name; a folder would lead out of the copy
_NOT_READ = "tune/ray/"  # what Tune notes for itself
_AT_ONCE = 8  # transfers
_TAGS = ("ETag", "etag", "generation", "md5Hash")
_DATES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


@dataclass(frozen=True)
class RemoteRun(RunStorage):
    """`uri`: the run's address. `below`: the folder of it that this place is, with a slash at its end, or nothing."""

    uri: str
    below: str = ""

    def __str__(self) -> str:
        return f"{self.uri}/{self.below}".rstrip("/")

    def __truediv__(self, name: str) -> "RemoteRun":
        return RemoteRun(self.uri, f"{self.below}{name}/")

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "below": self.below}  # without a connection: another process opens its own

    @property
    def location(self) -> str:
        return str(self)

    @property
    def folder(self) -> Path:
        return self._home / "files" / self.below

    def refresh(self) -> None:
        known = dict(self._versions())  # before the store is asked: what comes meanwhile is not taken for deleted
        found = self._listed("")
        if not self.below and known.get(STAMP) != found.get(STAMP):
            known, found = self._taken_up()
        for name in known.keys() - found.keys():
            self._forget(name)
        small = {name for name in found if name.endswith(_SMALL) and not f"{self.below}{name}".startswith(_NOT_READ)}
        self._fetch({name: found[name] for name in small})

    def _taken_up(self) -> tuple[dict[str, str], dict[str, str]]:
        """The versions here and in the store, once the copy is of the run that the store has now."""
        self._home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._home.with_suffix(".lock")):  # many start at once on a new node; one of them clears up
            known, found = dict(self._versions()), self._listed("")
            if STAMP in known and known[STAMP] != found.get(STAMP):
                shutil.rmtree(self._home, ignore_errors=True)
                known = {}
            if STAMP in found:
                self._fetch({STAMP: found[STAMP]})
        return known, found

    def pull(self, *names: str) -> None:
        for name in names:
            here = self._files_below(name)
            found = self._listed(name)
            for gone in here - found.keys():
                self._forget(gone)
            self._fetch(found)

    def atomic(self, name: str) -> AbstractContextManager[Path]:
        return self._sent_first(name)

    @contextmanager
    def _sent_first(self, name: str) -> Iterator[Path]:
        with atomic_path(self.folder / name) as temporary:
            yield temporary
            version = self._send(temporary, name)
        self._mark(name, version)

    def push(self, *names: str) -> None:
        files = {each for name in names for each in self._files_below(name)}
        for name in sorted(files, key=lambda each: (each.endswith(".json"), each)):
            state = _state(self.folder / name)
            if self._marker(name)[1] != state:
                self._mark(name, self._send(self.folder / name, name), state)

    def replace(self, name: str) -> None:
        self.push(name)
        surplus = self._listed(name).keys() - self._files_below(name)
        for gone in sorted(surplus, key=lambda each: (not each.endswith(".json"), each)):  # complete no more
            self._remove(gone)

    def delete(self, name: str) -> None:
        for each in self._listed(name):
            self._remove(each)
        for each in self._files_below(name):
            self._forget(each)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def glob(self, pattern: str) -> list[str]:
        found = self._call(self._fs.glob, f"{glob.escape(self._path(''))}{pattern}")
        return sorted(str(each)[len(self._path("")) :] for each in found)

    def sizes(self) -> Mapping[str, int]:
        total: dict[str, int] = {}
        for name, info in self._infos("").items():
            entry = name.partition("/")[0]
            total[entry] = total.get(entry, 0) + int(info["size"] or 0)
        return dict(sorted(total.items()))

    def arrow_filesystem(self) -> tuple[str, Any]:
        return self._path("").rstrip("/"), PyFileSystem(_ByName(self._fs))

    @property
    def _home(self) -> Path:
        return cache_folder() / "runs" / hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.uri)

    @property
    def _fs(self) -> Any:
        return self._store[0]

    def _path(self, name: str) -> str:
        """A file's path on the store's file system."""
        return f"{self._store[1].rstrip('/')}/{self.below}{name}"

    def _infos(self, name: str) -> dict[str, dict[str, Any]]:
        """What the store says of a file, or of all files below a folder, by name."""
        start = len(self._path(""))
        try:
            found = self._call(self._fs.find, self._path(name).rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        files = {path[start:]: info for path, info in found.items() if info.get("type") == "file"}
        return {name: info for name, info in files.items() if not _NOT_BELOW & {*name.split("/")}}

    def _listed(self, name: str) -> dict[str, str]:
        """The versions of a file, or of all files below a folder, by name."""
        return {each: _version(info) for each, info in self._infos(name).items()}

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
        lock = self._marker_path(name).with_name(f".{Path(name).name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # several workers of a node ask for the same table
            if self._is_here(name, version):
                return
            try:
                with atomic_path(self.folder / name) as temporary:
                    self._call(self._fs.get_file, self._path(name), str(temporary))
            except FileNotFoundError:
                return  # deleted since it was listed
            self._mark(name, version)

    def _send(self, source: Path, name: str) -> str:
        """Returns the version that the store has now."""
        try:
            self._call(self._fs.put_file, str(source), self._path(name))
            return _version(self._call(self._fs.info, self._path(name)))
        except FileNotFoundError as error:
            raise UserError(f"cannot write {self}/{name}: {error}; does the bucket exist?") from error

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call(self._fs.rm_file, self._path(name))
        self._forget(name)

    def _call(self, do: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Calls the store, again where that may help. Raises FileNotFoundError, or UserError in one line."""
        return attempt(self.location, partial(do, *arguments, **options))

    def _is_here(self, name: str, version: str) -> bool:
        return self._marker(name)[0] == version and (self.folder / name).is_file()

    def _versions(self) -> Iterable[tuple[str, str]]:
        root = self._marker_path("")
        with suppress(FileNotFoundError):  # another process is clearing up
            for path in root.rglob("*"):
                if path.is_file() and not path.name.startswith("."):
                    name = path.relative_to(root).as_posix()
                    yield name, self._marker(name)[0]

    def _marker_path(self, name: str) -> Path:
        return self._home / "versions" / f"{self.below}{name}"

    def _marker(self, name: str) -> tuple[str, str]:
        """The store's version of the file here, and the file's state then; empty when there is none."""
        try:
            version, _, state = self._marker_path(name).read_text(encoding="utf-8").partition("\n")
        except (OSError, ValueError):
            return "", ""
        return version, state

    def _mark(self, name: str, version: str, state: str | None = None) -> None:
        write_text(self._marker_path(name), f"{version}\n{_state(self.folder / name) if state is None else state}")

    def _forget(self, name: str) -> None:
        self._marker_path(name).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)


class _ByName(FSSpecHandler):  # type: ignore[misc]
    """Deletes what is called `run*`, not all that begins with `run`."""

    def delete_dir(self, path: str) -> None:
        self.fs.rm(glob.escape(path), recursive=True)

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)


def _version(info: Mapping[str, Any]) -> str:
    """Differs when the content does, and is the same in a listing and for one file.

    Dates count only where a store has nothing else: a listing may have them with milliseconds, a file without.
    """
    tags = [f"{key} {info[key]}" for key in _TAGS if info.get(key)]
    dates = [_to_the_second(info[key]) for key in _DATES if info.get(key)]
    return " ".join([str(info["size"]), *(tags or dates)[:1]])


def _to_the_second(date: object) -> str:
    if isinstance(date, int | float):
        return str(int(date))
    return str(date).partition(".")[0].removesuffix("Z").removesuffix("+00:00")


def _state(path: Path) -> str:
    """Differs when the file here was written again."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
