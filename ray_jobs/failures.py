"""How work fails: what a training's failure is, and how a job says that it failed after it has told why."""

from collections.abc import Iterable
from dataclasses import dataclass

LOST_WORKERS = 3  # how many times a task is done again after its process was lost


@dataclass(frozen=True)
class Failure:
    """Why a training failed: `message` in one line; `user_error` when a user can mend it; `trace` for the log.

    may_pass: not its own doing, but that of a machine, a disk or a store; the same training may succeed later.
    """

    message: str
    user_error: bool = False
    trace: str = ""
    may_pass: bool = False


class JobFailed(Exception):
    """A job ended without its result; every cause was printed. `exit_code`: see `exit_code_of`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(failures: Iterable[Failure]) -> int:
    """2 when all are users' mistakes, else 1."""
    return 2 if all(failure.user_error for failure in failures) else 1
