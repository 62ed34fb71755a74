"""The end of a worker that hangs: a lost worker is replaced from its checkpoint, a hanging one would wait for ever."""

import faulthandler
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dsmip.storage.run_storage import RunStorage

_MOST_REARMING_SECONDS = 1.0


class StallWatch:
    """Ends this process when `alive` has not been called for `seconds`, and writes to `path` what all threads did.

    It watches from the first call on. The file is there only while it watches, or when it has ended a process.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        self._file: TextIO | None = None
        self._armed = 0.0

    def alive(self) -> None:
        """Says that the work goes on; cheap enough for every step."""
        now = time.monotonic()
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        elif now - self._armed < min(_MOST_REARMING_SECONDS, self._seconds / 10):
            return
        self._armed = now
        # A thread in C: it ends a process whose Python threads cannot run either.
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Watches no more."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = None


def collect_stalled(storage: RunStorage, name: str) -> list[str]:
    """Files that ended workers of a training left on this node; renamed, so that they are found once, and sent.

    Every worker calls it, before any of them watches itself. The files' names are `stall_file`'s with `.ended` for
    `.txt`. A worker that was killed leaves an empty one.
    """
    ended = []
    for path in sorted(storage.folder.glob(f"{name}.stalled-*.txt")):
        with suppress(FileNotFoundError):  # another worker that sees the folder has just taken it
            if path.stat().st_size > 0:
                ended.append(path.replace(path.with_suffix(".ended")).name)
    storage.push(*ended)
    return [f"{storage}/{each}" for each in ended]


def stall_file(folder: Path, name: str, rank: int) -> Path:
    """Where a worker says what it did when it was ended."""
    return folder / f"{name}.stalled-{rank}.txt"
