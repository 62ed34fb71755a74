"""Progress in plain lines, for jobs that may run without Ray."""

import time

_SECONDS_A_LINE = 10


class ProgressLines:
    """A `dsmip.progress.Progress`: a line at most every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= _SECONDS_A_LINE:
            print(f"  {what}: {done} of {total}", flush=True)
            self._last = time.monotonic()
