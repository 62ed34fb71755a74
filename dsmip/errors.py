"""Errors that end a command with one line instead of a traceback, and the recognition of a full disk."""

import errno
import os

from dsmip.messages import has_secret, masked

# By the texts that libraries have of them; "File too large" alone is also said of other things.
_FULL = {
    errno.ENOSPC: os.strerror(errno.ENOSPC),
    errno.EDQUOT: os.strerror(errno.EDQUOT),
    errno.EFBIG: f"(os error {errno.EFBIG})",
}


class ReportedError(Exception):
    """What ends a command with its message as one line on stderr. Secrets in the message are masked.

    Attributes:
        exit_code: the command's: 2 for a user's mistake, 1 for anything else.
        may_pass: it comes of a machine, a disk or a store; the same work may succeed later.
    """

    exit_code = 1
    may_pass = False

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class UserError(ReportedError):
    """A mistake in an input, a path, a key or a request. The message names the thing and what to do."""

    exit_code = 2


class StoreAway(ReportedError):
    """A store that cannot be reached, also when asked again: nobody's mistake, and later it may answer."""

    may_pass = True


def first_line(error: BaseException) -> str:
    """What a library's error says, in a line of at most 200 characters; its class too where that is little."""
    said = str(error).strip()
    return (repr(error) if not said or isinstance(error, LookupError) else said).splitlines()[0][:200]


def no_room(error: BaseException | None) -> int | None:
    """The number of a full disk, quota or file, if the error, or what it came of, is one; else None.

    Not every library has an OSError for that.
    """
    if error is None:
        return None
    for code, text in _FULL.items():
        if getattr(error, "errno", None) == code or text in str(error):
            return code
    return no_room(error.__cause__ or error.__context__)


def no_room_message(error: BaseException, otherwise: str) -> str:
    """One line for an error that `no_room` knows.

    Args:
        error: It; where it names no file, what it came of may.
        otherwise: Which disk it is, where none of them does: "of the run", "of /data".
    """
    found: BaseException | None = error
    while found is not None and not getattr(found, "filename", None):
        found = found.__cause__ or found.__context__
    where = f"of {getattr(found, 'filename')}" if found is not None else otherwise  # noqa: B009
    if no_room(error) == errno.EFBIG:
        return f"a file has become larger than allowed on the disk {where}; raise the limit (ulimit -f)"
    return f"no space left on the disk {where}; make room there"


def refuse_secret(text: str, what: str) -> None:
    """Checks that a text can be stored, or used as an address: that it holds no password and no signature.

    Args:
        what: What the text is, as the message begins.

    Raises:
        UserError: It does; the message has it masked.
    """
    if has_secret(text):
        raise UserError(
            f"{what}: {text} holds a password, key or signature, which is never stored; leave it out and give it as "
            "the store's own tools take it (environment variables, their configuration files)"
        )
