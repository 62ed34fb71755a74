"""Locks of table files: many processes read one, or one process alone has it; a process that is killed leaves none.

The kernel keeps them (`flock`) on empty files of their own, also between nodes on file systems that know such locks.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def lock_shared(path: Path) -> int | None:
    """Waits for the moment that another process needs to remove a file; what it returns keeps the file.

    Returns:
        A file descriptor to close, as the end of the process does; None where there can be no lock, as in a folder
        that may only be read: nothing is removed there.
    """
    with suppress(OSError):
        return _locked(path, fcntl.LOCK_SH)
    return None


def lock_alone(path: Path) -> int | None:
    """A file descriptor to close; None while others have the lock.

    Raises:
        OSError: There can be no lock.
    """
    try:
        return _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _locked(path: Path, operation: int) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        except PermissionError:  # another user's
            descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            fcntl.flock(descriptor, operation)
        except OSError:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # removed with the file that it was for, while this process waited
