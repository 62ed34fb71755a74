"""Copies of a store's files on this node: fetched once, checked, and given up again when room is needed.

<cache>/data/<SHA-256 of the manifest>/<path below the dataset>

A copy's time of change is a mark: it was compared with the manifest and nobody has written to it since. Its time of
access is when it was last asked for; what was not asked for the longest goes first. A copy that goes while somebody
has it open stays readable for them.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from dsmip.errors import UserError
from dsmip.private import lock_file
from dsmip.storage.atomic import atomic_path, sha256_file
from dsmip.storage.dataset_storage import StoredFile
from dsmip.storage.object_store import private_cache

LIMIT = "DSMIP_CACHE_GB"
_CHECKED_NS = 86_400_000_000_000  # one day after the epoch: nothing written now has it
_FREE_SHARE, _FREE_BYTES = 0.1, 10e9  # of a disk, where no limit is given
_TABLE_SECONDS = 86_400.0  # other files than shards are handed around by path: they stay for a day after their use
_SHARD_SUFFIX = ".tar"
_FRESH = ".fresh-"
_FRESH_SECONDS = 86_400.0  # nobody reads one file for longer


def data_cache() -> Path:
    """Where copies of datasets are on this node: a private folder (`dsmip.private`)."""
    return private_cache("data")


def checked_copy(target: Path, file: StoredFile, address: str, download: Callable[[Path], None]) -> Path:
    """Downloads a file unless its copy is there and whole. Of several processes of a node one does, the others wait.

    Args:
        target: Where the copy belongs.
        file: What the manifest says of the file.
        address: The file's name for messages.
        download: Writes the store's bytes to a path.

    Returns:
        `target`, which holds the file's content.

    Raises:
        UserError: The store's bytes are not the manifest's, also when fetched again; or `download` did.
    """
    data_cache()  # refused, if it is not ours: marks and contents would be anybody's
    if _is_checked(target, file):
        _mark(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file(target.with_name(f".{target.name}.lock"))):
        if _is_checked(target, file) or (target.is_file() and _is_right(target, file)):
            _mark(target)
            return target
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        make_room(file.bytes or 0)
        for _ in range(2):
            with atomic_path(target) as temporary:
                download(temporary)
                if right := _is_right(temporary, file):
                    _mark(temporary)
            if right:
                return target
            target.unlink()
    raise UserError(
        f"{address}: not the bytes that the manifest names (fetched twice; SHA-256 {file.sha256[:12]}... expected); "
        "was the dataset changed? Open it again, or upload it again"
    )


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """An empty folder for what is fetched for one use. Of a process that is killed it stays until room is made."""
    with TemporaryDirectory(dir=data_cache(), prefix=_FRESH) as folder:
        yield Path(folder)


def make_room(num_bytes: int) -> None:
    """Removes the copies that were not asked for the longest until `num_bytes` more fit in the limit."""
    _remove_abandoned()
    found = sorted(_copies(data_cache()))
    held = sum(size for _, size, _ in found)
    room = _limit(held) - num_bytes
    newest_table = time.time() - _TABLE_SECONDS
    for used, size, path in found:
        if held <= room:
            return
        if path.suffix == _SHARD_SUFFIX or used < newest_table:
            path.unlink(missing_ok=True)
            held -= size


def _remove_abandoned() -> None:
    for folder in data_cache().glob(f"{_FRESH}*/"):
        with suppress(FileNotFoundError):  # its process, or another one, removes it too
            if folder.stat().st_mtime < time.time() - _FRESH_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _limit(held: int) -> float:
    """Bytes that copies may take.

    Args:
        held: Bytes that they take now.

    Raises:
        UserError: DSMIP_CACHE_GB is no number above 0.
    """
    stated = stated_limit(LIMIT)
    if stated is not None:
        return stated
    return held + spare_bytes(data_cache())


def spare_bytes(folder: Path) -> float:
    """Bytes that a folder's disk has beyond what is left to others: a tenth of it, but no more than 10 GB."""
    disk = shutil.disk_usage(folder)
    return disk.free - min(_FREE_SHARE * disk.total, _FREE_BYTES)


def stated_limit(variable: str) -> float | None:
    """Bytes that a variable allows, in gigabytes there; None where it is not set.

    Raises:
        UserError: It is no number above 0.
    """
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{variable}={text}: must be a number of gigabytes above 0")
    return limit * 1e9


def _copies(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each copy was last asked for, its size, and where it is."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):  # locks, and what is being fetched
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            yield status.st_atime, status.st_size, path


def _is_checked(path: Path, file: StoredFile) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_mtime_ns == _CHECKED_NS and file.bytes in (None, status.st_size)


def _is_right(path: Path, file: StoredFile) -> bool:
    return file.bytes in (None, path.stat().st_size) and sha256_file(path) == file.sha256


def _mark(path: Path) -> None:
    """Marks a copy as checked, and as asked for now."""
    try:
        os.utime(path, ns=(time.time_ns(), _CHECKED_NS))
    except FileNotFoundError:
        return  # another process made room; whoever opens it will see
