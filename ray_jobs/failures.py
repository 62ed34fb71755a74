"""How a job says that it failed after it has told why."""


class JobFailed(Exception):
    """A job ended without its result; every cause was printed. `exit_code`: 2 when all are users' mistakes, else 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
