"""Exceptions for what a user can mend: the command line prints their message, without a traceback; and a full disk."""

import errno


class UserError(Exception):
    """A mistake in an input, a path, a key or a request: exit code 2. The message names the thing and what to do."""


class StoreAway(UserError):
    """A store that cannot be reached, also when asked again: nobody's mistake, and later it may answer. Exit code 1."""


def no_room(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is a full disk or quota. Not every library raises OSError for that."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or no_room(error.__cause__ or error.__context__)
