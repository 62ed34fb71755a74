"""A program on a pseudo terminal, and the screen that its user sees: all lines, those scrolled out of sight too."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

WAIT_SECONDS = 60.0
_CODE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")
_OF_TERMINALS = ("COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Screen:
    """What is seen after all that was written; a code that is not known is a failure.

    Attributes:
        lines: From the first one on, without spaces at their ends.
        cursor_shown: Whether the cursor is.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cursor_shown = True
        self._cells: list[list[str]] = [[]]
        self._row = self._column = 0
        self._rest = ""

    @property
    def lines(self) -> list[str]:
        lines = ["".join(cells).rstrip() for cells in self._cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def write(self, text: str) -> None:
        """A code that is cut off waits for its rest."""
        text, at = self._rest + text, 0
        self._rest = ""
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
            elif code := _CODE.match(text, at):
                self._obey(code[1], code[2], code[3])
                at = code.end()
            else:
                self._rest = text[at:]
                assert len(self._rest) < 20, f"unknown code {self._rest[:20]!r}"
                return

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._down()
        else:
            assert character.isprintable(), f"{character!r} reaches the terminal"
            if self._column == self.columns:
                self._column = 0
                self._down()
            cells = self._cells[self._row]
            cells.extend(" " * (self._column + 1 - len(cells)))
            cells[self._column] = character
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])

    def _obey(self, private: str, number: str, name: str) -> None:
        if name == "A":  # up, at most to the first line in sight
            self._row = max(self._row - int(number or 1), len(self._cells) - self.rows, 0)
        elif (name, number) == ("K", "2"):
            self._cells[self._row] = []
        elif private and number == "25" and name in "hl":
            self.cursor_shown = name == "h"
        else:
            assert name == "m", f"unknown code {private}{number}{name}"


class OnTerminal:
    """A program that reads lines of JSON from its stdin and writes to a pseudo terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int, screen: Screen) -> None:
        self.screen = screen
        self._process, self._master = process, master
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def tell(self, *values: Any) -> None:
        """Sends it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(values).encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, is_so: Callable[[list[str]], object]) -> None:
        """Reads what it writes until the lines on the screen are so."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_so(self.screen.lines):
            more = self._read() and time.monotonic() < deadline
            assert more, "\n".join(["it never was so:", *self.screen.lines])

    def ended(self) -> int:
        """Ends its stdin and reads all that is left; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        while self._read():
            pass
        return self._process.wait(WAIT_SECONDS)

    def _read(self) -> bool:
        """Waits for more; False at the end."""
        ready, _, _ = select.select([self._master], [], [], WAIT_SECONDS)
        assert ready, "\n".join(["nothing more comes:", *self.screen.lines])
        try:
            content = os.read(self._master, 1 << 16)
        except OSError:  # as Linux says that nobody has the other side open any more
            return False
        self.screen.write(self._decoder.decode(content))
        return bool(content)


@contextmanager
def on_terminal(program: str, *, columns: int = 120, rows: int = 40, folder: Path = ROOT) -> Iterator[OnTerminal]:
    """Runs Python's text with stdout and stderr on a terminal of that size; it is killed when the block is left."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in _OF_TERMINALS}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
        cwd=folder,
        env={**variables, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )
    os.close(slave)
    try:
        yield OnTerminal(process, master, Screen(columns, rows))
    finally:
        process.kill()
        process.wait()
        os.close(master)
