"""How work fails: what a training's failure is, and how a job says that it failed after it has told why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """Why a training failed: `message` in one line; `user_error` when a user can mend it; `trace` for the log."""

    message: str
    user_error: bool = False
    trace: str = ""


class JobFailed(Exception):
    """A job ended without its result; every cause was printed. `exit_code`: 2 when all are users' mistakes, else 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
