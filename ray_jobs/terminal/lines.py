"""Lines on stdout and stderr, and the consoles of tables and bars: what they print passes `dsmip.messages.shown`."""

import os
import sys
import warnings
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from dsmip.messages import printable, shown

_plain_warning = warnings.formatwarning
_PLAIN_WIDTH = 140  # of tables that go to a file or a pipe


def say(line: str) -> None:
    """Prints a line of a command's result on stdout."""
    print(shown(line), flush=True)


def complain(line: str) -> None:
    """Prints a line on stderr."""
    print(shown(line), file=sys.stderr, flush=True)


class SafeConsole(Console):
    """A console for text of any origin: no control character of it reaches the terminal, and no secret is shown.

    rich's own control codes are not text, and pass.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def result_console() -> Console:
    """Where a command's tables and results are printed: stdout, as wide as the terminal."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return SafeConsole(file=sys.stdout, highlight=False, markup=False, width=width)


def progress_console() -> Console:
    """Where progress is shown that is no result: stderr."""
    return SafeConsole(stderr=True, highlight=False, markup=False)


def open_streams() -> None:
    """Prepares stdin, stdout and stderr; to be called first.

    A closed one (`2>&-`) is opened on nothing: else the next file that is opened takes its place, and is written into.
    What a stream cannot encode it gets as escapes. Warnings are printed as all other lines.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning


def _format_warning(*about: Any, **more: Any) -> str:
    return shown(_plain_warning(*about, **more))
