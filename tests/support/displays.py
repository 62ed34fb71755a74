"""What commands say, for tests that read it."""

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)
from ray_jobs.terminal.display import Display


class Lines(Display):
    """A display that keeps what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
