"""Errors that end a command with one line instead of a traceback, and the recognition of a full disk."""

import errno


class ReportedError(Exception):
    """What ends a command with its message as one line on stderr.

    Attributes:
        exit_code: the command's: 2 for a user's mistake, 1 for anything else.
        may_pass: it comes of a machine, a disk or a store; the same work may succeed later.
    """

    exit_code = 1
    may_pass = False


class UserError(ReportedError):
    """A mistake in an input, a path, a key or a request. The message names the thing and what to do."""

    exit_code = 2


class StoreAway(ReportedError):
    """A store that cannot be reached, also when asked again: nobody's mistake, and later it may answer."""

    may_pass = True


def no_room(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is a full disk or quota. Not every library raises OSError for that."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or no_room(error.__cause__ or error.__context__)
