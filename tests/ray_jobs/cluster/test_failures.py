"""What an error means: a user's mistake or not, and whether the same work may succeed later."""

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)
from dsmip.errors import ReportedError, StoreAway, UserError
from dsmip.runs.checkpoints import NoSoundCheckpoint
from dsmip.storage.object_store import attempt
from ray_jobs.cluster.failures import Failure, failure_of, traced

FULL = OSError(errno.ENOSPC, "No space left on device")


def of_a_store(error: Exception) -> Exception:
    """What is made of a client's error."""

    def call() -> None:
        raise error

    try:
        attempt("s3://x/a", call)
    except ReportedError as raised:
        return raised
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "user_error", "may_pass"),
    [
        (UserError("the training has diverged"), True, False),
        (ValueError("no such shape"), False, False),
        (RuntimeError("mat1 and mat2 cannot be multiplied"), False, False),
        (StoreAway("s3://x: cannot be reached"), False, True),
        (NoSoundCheckpoint("no checkpoint can be read"), True, True),
        (FULL, True, True),
        (OSError(errno.EIO, "Input/output error"), False, True),
        (MemoryError(), False, True),
        (torch.OutOfMemoryError("CUDA out of memory"), False, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), False, True),
    ],
)
def test_whose_doing_an_error_is(error: Exception, user_error: bool, may_pass: bool, tmp_path: Path) -> None:
    for each in (error, pickle.loads(pickle.dumps(error))):
        failure = failure_of(each, tmp_path)  # type: ignore[arg-type]
        assert (failure.user_error, failure.may_pass) == (user_error, may_pass)


@pytest.mark.parametrize(
    ("error", "user_error"),
    [
        (lambda: of_a_store(ConnectionRefusedError("refused")), False),
        (lambda: of_a_store(PermissionError("the key has expired")), True),
        (lambda: of_a_store(FULL), True),
    ],
)
def test_a_store_is_never_a_trials_own_doing(
    error: Callable[[], Exception], user_error: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failure = failure_of(error(), tmp_path)  # type: ignore[arg-type]
    assert (failure.user_error, failure.may_pass, failure.trace) == (user_error, True, "")


def test_a_trace_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    from dsmip.storage.run_storage import LocalRun

    failure = Failure("RuntimeError: x", trace="Traceback")
    assert traced(failure, LocalRun(tmp_path), "error.txt") == f" (see {tmp_path}/error.txt)"
    (tmp_path / "file").touch()
    assert traced(failure, LocalRun(tmp_path / "file"), "error.txt") == ""
