"""What a user can mend: the exception whose message the command line prints before it exits with 2; a full disk."""

import errno


class UserError(Exception):
    """A mistake in an input, a path, a key or a request. The message names the thing and what to do about it."""


def no_room(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is a full disk or quota. Not every library raises OSError for that."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or no_room(error.__cause__ or error.__context__)
