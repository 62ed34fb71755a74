"""The one exception for what a user can mend: the command line prints its message and exits with 2."""


class UserError(Exception):
    """A mistake in an input, a path, a key or a request. The message names the thing and what to do about it."""
