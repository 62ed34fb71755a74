"""Failures of trainings and tasks: their causes, their traces, and the error of a job that has failed."""

import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from dsmip.errors import ReportedError, UserError, no_room, no_room_message
from dsmip.messages import masked
from dsmip.storage.run_storage import RunStorage

LOST_WORKERS = 3  # how many times a task is done again after its process was lost


@dataclass(frozen=True)
class Failure:
    """Why a training failed.

    Attributes:
        message: In one line.
        user_error: Whether a user can mend it.
        trace: For the log.
        may_pass: Whether it came of a machine, a disk or a store: the same training may succeed later.
    """

    message: str
    user_error: bool = False
    trace: str = ""
    may_pass: bool = False


class JobFailed(ReportedError):
    """A job ended without its result; every cause was printed. `exit_code`: see `exit_code_of`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(failures: Iterable[Failure]) -> int:
    """2 when all are users' mistakes, else 1."""
    return 2 if all(failure.user_error for failure in failures) else 1


def failure_of(error: BaseException, storage: RunStorage) -> Failure:
    """The failure that an error means.

    Args:
        error: what a training or a trial raised.
        storage: of the checkpoints, for an error that does not say which disk is full.
    """
    may_pass = _may_pass(error)
    if isinstance(error, ReportedError):
        return Failure(str(error), user_error=isinstance(error, UserError), may_pass=may_pass)
    if no_room(error):
        return Failure(no_room_message(error, f"of {storage}"), user_error=True, may_pass=may_pass)
    lines = masked("".join(traceback.format_exception(error)))
    return Failure(_last_line(lines), trace=lines, may_pass=may_pass)


def traced(failure: Failure, storage: RunStorage, name: str) -> str:
    """Writes a failure's traceback, if it has one, to the file `name`; returns where it is, for the end of a line."""
    if not failure.trace:
        return ""
    try:
        storage.write_text(name, failure.trace)
    except (ReportedError, OSError):  # a store that is away, a disk that is full: perhaps the failure's own cause
        return ""
    return f" (see {storage}/{name})"


def _may_pass(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is a fault of the machine, a disk or a store."""
    if error is None:
        return False
    outside = isinstance(error, _machine_errors()) or (isinstance(error, ReportedError) and error.may_pass)
    no_memory = "allocate memory" in str(error)  # torch's RuntimeError on the CPU
    return outside or no_memory or no_room(error) is not None or _may_pass(error.__cause__ or error.__context__)


def _machine_errors() -> tuple[type[BaseException], ...]:
    import torch  # seconds, which processes that only make shards need not spend

    # A GPU may be used by others as well.
    return (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
