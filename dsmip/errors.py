"""Exceptions for what a user can mend: the command line prints their message, without a traceback."""


class UserError(Exception):
    """A mistake in an input, a path, a key or a request: exit code 2. The message names the thing and what to do."""


class StoreAway(UserError):
    """A store that cannot be reached, also when asked again: nobody's mistake, and later it may answer. Exit code 1."""
