"""The served linker: the one of the moment, replaced by a new one when what it was opened from has changed."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dsmip.linking.linker import Linker
from dsmip.storage.locations import Location, local_path
from dsmip.storage.run_storage import RunStorage

# What is written last: of a bundle, and of a run.
_STAMPED = ("bundle.json", "*/part.json", "evaluate/validation/*/calibration.json")


@dataclass(frozen=True)
class Source:
    """Where linkers come from.

    Attributes:
        open: Opens a linker. It may take long, and raise a UserError.
        stamp: What changes when a linker must be opened anew; cheap.
    """

    open: Callable[[], Linker]
    stamp: Callable[[], str]


def reloading(first: Callable[[], Linker]) -> Callable[[], Linker]:
    """What opens a linker at first, and then always what its source has become: a model that is the same is shared."""
    last: Linker | None = None

    def opened() -> Linker:
        nonlocal last
        last = first() if last is None else last.reload()
        return last

    return opened


def stamp_of(location: Location) -> str:
    """Names, sizes and times of what a linker is made from; the same for ever where it is no folder of this machine."""
    folder = location.folder if isinstance(location, RunStorage) else local_path(location)
    if folder is None:
        return ""
    files = (path for pattern in _STAMPED for path in sorted(folder.glob(pattern)))
    stats = ((path.relative_to(folder), path.stat()) for path in files)
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


class Served:
    """A linker that is there for readers in any thread while the next one is opened.

    Args:
        source: Where it comes from.
        notice: Takes a line when it was opened again, or could not be.
        reloaded: Called when it was opened again.

    Raises:
        UserError: The first linker cannot be opened.
    """

    def __init__(
        self,
        source: Source,
        notice: Callable[[str], None] = lambda line: None,
        reloaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._source, self._notice, self._reloaded = source, notice, reloaded
        self._stamp = source.stamp()
        self._linker, self._since = source.open(), time.time()
        self._ends, self._checking = threading.Event(), threading.Lock()

    @property
    def linker(self) -> Linker:
        """The linker of the moment; keep it for as long as one answer needs it."""
        return self._linker

    @property
    def since(self) -> float:
        """When it was opened, in seconds of the wall clock."""
        return self._since

    def check(self) -> bool:
        """Opens the linker again if its source has changed, unless that is damaged; whether it was."""
        with self._checking:
            try:
                stamp = self._source.stamp()
                if stamp == self._stamp:
                    return False
                linker = self._source.open()
            except Exception as error:  # whatever is wrong with it: who watches goes on, and so does the old one
                self._notice(f"what is served has changed and cannot be opened; the old one goes on: {error}")
                return False
            self._linker, self._since, self._stamp = linker, time.time(), stamp
        self._reloaded()
        self._notice(f"opened again: {linker}")
        return True

    def watch(self, seconds: float) -> None:
        """Checks for changes every so often, in a thread, until `close`."""
        threading.Thread(target=self._watch, args=(seconds,), name="reloading", daemon=True).start()

    def close(self) -> None:
        self._ends.set()

    def _watch(self, seconds: float) -> None:
        while not self._ends.wait(seconds):
            self.check()
