"""The tables of one place, a folder or a folder of an object store: found, written, listed and removed.

<place>/<key>.safetensors   a table; the key says all that its content depends on (`dsmip.encoders.feature_keys`)
<place>/<key>.json          written last: there is a table, what it is of, its size and digest, when it was last used
<place>/.locks/<key>.*      held by whoever reads or writes the table on this node, or in the folder on any node

A table's time of change is a mark, as of copies (`dsmip.storage.cache`): it was compared with its digest and nobody has
written to it since.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmip.data.manifest import Count, Digest
from dsmip.encoders.shared_tables.locks import lock_alone, lock_shared
from dsmip.errors import StoreAway, UserError
from dsmip.storage.atomic import sha256_file
from dsmip.storage.cache import spare_bytes, stated_limit
from dsmip.storage.run_storage import LocalRun, RunStorage

LIMIT = "DSMIP_FEATURES_GB"
Say = Callable[[str], None]
_TABLE, _ENTRY, _LOCKS = ".safetensors", ".json", ".locks"
_KEY = re.compile(r"[0-9a-f]{64}")
_CHECKED_NS = 86_400_000_000_000  # one day after the epoch: nothing written now has it
_WAIT_SECONDS = 0.5  # between two looks whether another process has written a table
_held: dict[Path, int] = {}  # locks of the tables that this process has opened: they are memory-mapped until it ends


class Origin(BaseModel):
    """For whom a table was computed first, for readers of a list. `data`: the name of the data set."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    data: str
    split: str
    part: str


class Entry(BaseModel):
    """`<key>.json`. `used`: seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    origin: Origin
    rows: Count
    bytes: Count
    sha256: Digest
    used: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Listed:
    """A table of a place.

    Attributes:
        entry: None: it was never finished, or what described it is gone.
        num_bytes: As it takes room.
        used: When it was last used, in seconds since the epoch; 0 where nobody says.
    """

    key: str
    entry: Entry | None
    num_bytes: int

    @property
    def used(self) -> float:
        return self.entry.used if self.entry else 0.0


class SharedTables:
    """The tables of a place. `str()` is what a user calls it."""

    def __init__(self, storage: RunStorage) -> None:
        self.storage = storage

    def __str__(self) -> str:
        return str(self.storage)

    @property
    def is_writable(self) -> bool:
        """Whether tables can be put there: tried, with a folder for locks and, in a store, a file."""
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            if not isinstance(self.storage, LocalRun):
                self.storage.write_text("about.txt", "Feature tables of dsmip; `dsmip cache list` shows them.\n")
        except (OSError, UserError, StoreAway):
            return False
        return os.access(self.storage.folder, os.W_OK)

    def find(self, key: str, say: Say) -> Path | None:
        """The table of that key, here on this node and kept there until this process ends; None: there is none.

        Args:
            say: Told of one that is damaged.
        """
        entry = self._entry(key, fresh=True)
        if entry is None:
            return None
        self._keep(key)
        entry = self._entry(key, fresh=False)  # it may have been removed before it was kept
        if entry is None:
            return None
        path = self.storage.folder / f"{key}{_TABLE}"
        self.storage.pull(path.name)
        if fault := _fault(path, entry):
            say(f"{path}: the features are damaged ({fault}); they are computed again")
            return None
        with suppress(OSError, UserError, StoreAway):  # of a place that may only be read
            self._describe(key, entry.model_copy(update={"used": time.time()}))
        return path

    def made(self, key: str, origin: Origin, write: Callable[[Path], int], waiting: Callable[[], None]) -> Path:
        """The table of that key, written unless another process writes it meanwhile, which is waited for.

        Args:
            write: Writes the table to a path; returns its rows.
            waiting: Called from time to time.

        Raises:
            OSError: The disk is full, or the like.
        """
        path = self.storage.folder / f"{key}{_TABLE}"
        with self._writing(key, waiting):
            if found := self.find(key, lambda line: None):
                return found
            self._remove_leftovers(key)
            self.make_room()
            self.storage.delete(f"{key}{_ENTRY}")
            self._keep(key)
            with self.storage.atomic(path.name) as temporary:
                rows = write(temporary)
                num_bytes, sha256 = temporary.stat().st_size, sha256_file(temporary)
                _mark(temporary)
            entry = Entry(origin=origin, rows=rows, bytes=num_bytes, sha256=sha256, used=time.time())
            self._describe(key, entry)
        self.make_room()
        return path

    def listed(self) -> list[Listed]:
        """All tables, the one first that was not used for the longest."""
        if not self.storage.folder.is_dir() and isinstance(self.storage, LocalRun):
            return []
        self.storage.refresh()
        sizes = self.storage.sizes()
        keys = {name.removesuffix(_TABLE): size for name, size in sizes.items() if _is_table(name)}
        found = [Listed(key, self._entry(key, fresh=False), size) for key, size in keys.items()]
        return sorted(found, key=lambda each: (each.used, each.key))

    def make_room(self) -> list[Listed]:
        """Removes what was not used for the longest until the rest fits the limit, but nothing that is in use."""
        found = self.listed()
        limit = self.limit(sum(each.num_bytes for each in found))
        return [] if limit is None else self.shrink(found, limit)

    def shrink(self, found: list[Listed], limit: float) -> list[Listed]:
        """As `make_room`, of these tables.

        Args:
            limit: In bytes.

        Returns:
            What was removed.
        """
        held, removed = sum(each.num_bytes for each in found), []
        for each in found:
            if held <= limit:
                break
            if self._removed(each.key):
                held -= each.num_bytes
                removed.append(each)
        return removed

    def limit(self, held: int) -> float | None:
        """Bytes that all tables may take, of which they take `held`; None in a store where nothing is said.

        Of a disk a tenth stays free, but no more than 10 GB.

        Raises:
            UserError: DSMIP_FEATURES_GB is no number above 0.
        """
        stated = stated_limit(LIMIT)
        if stated is not None or not isinstance(self.storage, LocalRun) or not self.storage.folder.is_dir():
            return stated
        return held + spare_bytes(self.storage.folder)

    def in_use(self, key: str) -> bool:
        """Whether a process reads or writes it: of a store's, on this node."""
        try:
            locks = [lock_alone(self._lock(key, "write")), lock_alone(self._lock(key, "read"))]
        except OSError:
            return False
        for lock in locks:
            if lock is not None:
                os.close(lock)
        return None in locks

    def remove_leftovers(self) -> int:
        """Removes what killed writers have left; returns its bytes."""
        held = 0
        for path in self.storage.folder.glob(f".*{_TABLE}.*"):
            key = path.name.strip(".").partition(".")[0]
            if not _KEY.fullmatch(key):
                continue
            with suppress(OSError):
                lock = lock_alone(self._lock(key, "write"))
                if lock is not None:
                    held += _num_bytes(path)
                    self._remove_leftovers(key)
                    os.close(lock)
        return held

    @property
    def _locks(self) -> Path:
        return self.storage.folder / _LOCKS

    def _lock(self, key: str, kind: Literal["read", "write"]) -> Path:
        return self._locks / f"{key}.{kind}"

    def _keep(self, key: str) -> None:
        """Keeps anybody from removing the table until this process ends."""
        path = self._lock(key, "read")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path not in _held and (lock := lock_shared(path)) is not None:
            _held[path] = lock

    @contextmanager
    def _writing(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """The right to write a table: of one process of the node, or of all nodes that see the folder."""
        lock = None
        with suppress(OSError):  # no locks there: whoever comes last replaces an equal table
            self._locks.mkdir(parents=True, exist_ok=True)
            while (lock := lock_alone(self._lock(key, "write"))) is None:
                waiting()
                time.sleep(_WAIT_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _removed(self, key: str) -> bool:
        """Removes a table, unless somebody has it."""
        locks, files = list[int](), [self._lock(key, "write"), self._lock(key, "read")]
        try:
            self._locks.mkdir(exist_ok=True)
            for file in files:
                if (lock := lock_alone(file)) is None:
                    return False
                locks.append(lock)
            self.storage.delete(f"{key}{_ENTRY}")
            self.storage.delete(f"{key}{_TABLE}")
            for file in files:
                file.unlink(missing_ok=True)
        except OSError:  # without locks there, nobody knows who reads it
            return False
        finally:
            for lock in locks:
                os.close(lock)
        return True

    def _remove_leftovers(self, key: str) -> None:
        for leftover in self.storage.folder.glob(f".*{key}{_TABLE}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
            with suppress(OSError):
                leftover.unlink()

    def _entry(self, key: str, *, fresh: bool) -> Entry | None:
        if fresh:
            self.storage.pull(f"{key}{_ENTRY}")
        try:
            return Entry.model_validate_json((self.storage.folder / f"{key}{_ENTRY}").read_bytes())
        except (OSError, ValidationError):
            return None

    def _describe(self, key: str, entry: Entry) -> None:
        self.storage.write_json(f"{key}{_ENTRY}", entry.model_dump(mode="json"))


def _is_table(name: str) -> bool:
    """A user may name a folder that has files of his own, weights above all: these are never listed nor removed."""
    return bool(_KEY.fullmatch(name.removesuffix(_TABLE))) and name.endswith(_TABLE)


def _fault(path: Path, entry: Entry) -> str:
    """What is wrong with a table; empty when nothing is. Its digest is computed where there is no mark."""
    try:
        status = path.stat()
    except OSError:
        return "the file is missing"
    if status.st_size != entry.bytes:
        return f"{status.st_size} bytes instead of {entry.bytes}"
    if status.st_mtime_ns != _CHECKED_NS:
        if sha256_file(path) != entry.sha256:
            return "not the SHA-256 of when they were written"
        with suppress(OSError):  # another user's
            _mark(path)
    return ""


def _mark(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), _CHECKED_NS))


def _num_bytes(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())
