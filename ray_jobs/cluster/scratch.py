"""Folders of a worker for checkpoints on their way to and from storage, on its machine's own disk.

A worker that is killed cannot remove its folders: the next one on that machine does.
"""

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from dsmip.private import lock_file, private_folder, user_number

_held: list[FileLock] = []  # until the process ends: Ray stores the last checkpoint after the training has returned


class Scratch:
    """A folder that belongs to this process as long as it lives: the system lets go of its lock however it ends."""

    def __init__(self, root: Path | None = None) -> None:
        """root: where all processes of this user have theirs (default: a folder in the temporary one).

        Raises:
            UserError: When that folder is no private one (`dsmip.private`).
        """
        root = root or default_root(tempfile.gettempdir())
        private_folder(root, "set TMPDIR to another folder")
        with FileLock(lock_file(root / "starting")):
            _remove_abandoned(root)
            self._home = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
            lock = FileLock(lock_file(_lock_of(self._home)))
            lock.acquire()
        self._lock = lock
        _held.append(lock)

    @property
    def home(self) -> Path:
        """The folder of this process."""
        return self._home

    def remove(self) -> None:
        """Removes all of it, for a process that ends well."""
        shutil.rmtree(self._home, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def folder(self, prefix: str) -> Path:
        """A new empty folder; who has asked for it may remove it."""
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self._home))


def default_root(temporary: str) -> Path:
    """Where all processes of this user have their folders, in a folder for temporary files."""
    return Path(temporary) / f"dsmip-{user_number()}"


def _remove_abandoned(root: Path) -> None:
    for home in root.glob("worker-*/"):
        lock = FileLock(lock_file(_lock_of(home)))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        shutil.rmtree(home, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _lock_of(home: Path) -> Path:
    return home.with_suffix(".lock")
