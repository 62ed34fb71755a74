"""What an error of a training or a trial means: whose doing it is, and what is said of it."""

import traceback

import torch

from dsmip.checkpoints import NoSoundCheckpoint
from dsmip.errors import StoreAway, UserError, no_room
from dsmip.run_storage import RunStorage
from ray_jobs.failures import Failure

_NOT_ITS_DOING = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,  # others may use the same GPU
    torch.AcceleratorError,
    StoreAway,
    NoSoundCheckpoint,
)


def failure_of(error: BaseException, storage: RunStorage) -> Failure:
    """What is said of an error. storage: where checkpoints go, for an error that does not say which disk is full."""
    passing = _may_pass(error)
    if isinstance(error, UserError):
        return Failure(str(error), user_error=not isinstance(error, StoreAway), may_pass=passing)
    if no_room(error):
        full = getattr(error, "filename", None) or storage
        return Failure(f"no space left on the disk of {full}; make room there", user_error=True, may_pass=passing)
    lines = "".join(traceback.format_exception(error))
    return Failure(_last_line(lines), trace=lines, may_pass=passing)


def traced(failure: Failure, storage: RunStorage, name: str) -> str:
    """Writes a failure's traceback, if it has one, and says where it is."""
    if not failure.trace:
        return ""
    try:
        storage.write_text(name, failure.trace)
    except (UserError, OSError):  # a store that is away, a disk that is full: perhaps what it failed of
        return ""
    return f" (see {storage}/{name})"


def _may_pass(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is a fault of the machine, a disk or a store."""
    if error is None:
        return False
    outside = isinstance(error, _NOT_ITS_DOING) or "allocate memory" in str(error)  # torch's RuntimeError on the CPU
    return outside or no_room(error) or _may_pass(error.__cause__ or error.__context__)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
