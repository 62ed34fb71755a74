"""What is printed: no control character of a name reaches the terminal, by lines, tables, bars, errors or warnings."""

import ast
import subprocess
import sys
from io import StringIO

import pytest
from rich.table import Table
from rich.text import Text

from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import SafeConsole, complain, result_console, say
from tests.support.paths import ROOT

NAME = "\x1b]0;owned\x07\x9b31mred s3://key:hunter2@bucket"
SHOWN = "\\x1b]0;owned\\x07\\x9b31mred s3://***@bucket"


def test_lines_of_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{NAME} is\tdone")
    complain(f"error: {NAME}")
    said = capsys.readouterr()
    assert said.out == f"{SHOWN} is\tdone\n"
    assert said.err == f"error: {SHOWN}\n"


def test_tables_and_lines_of_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    console = result_console()
    table = Table("name", title=NAME, box=None)
    table.add_row(NAME)
    table.add_row(Text("\x1b[31m of a text"))
    console.print(table)
    console.print(f"{NAME}: done", soft_wrap=True)
    said = capsys.readouterr().out
    assert not set(said) & {"\x1b", "\x07", "\x9b"}
    assert said.count(SHOWN) == 3
    assert "\\x1b[31m of a text" in said
    assert "hunter2" not in said


def test_bars_and_lines_of_a_display() -> None:
    for terminal in (False, True):
        out = StringIO()
        with Display(SafeConsole(file=out, force_terminal=terminal, width=150, highlight=False)) as display:
            display(NAME, 1, 2)
            display("\x1b[31mshort", 2, 2)
            display.say(NAME)
        said = out.getvalue()
        assert "\\x1b[31mshort" in said
        assert "\x1b[31mshort" not in said
        assert "\x1b]0;" not in said
        assert "\x07" not in said
        assert SHOWN in said
        assert ("\x1b" in said) == terminal  # rich's own


def test_nothing_else_prints() -> None:
    """Another way to the terminal would be a way for control characters."""
    ways = ("print", "Console", "sys.stdout.write", "sys.stderr.write")
    allowed = {"ray_jobs/terminal/lines.py", "dsmip/messages.py"}
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("dsmip", "data_prep", "ray_jobs")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ways
    }
    assert found == allowed


def test_a_closed_stderr_and_a_stdout_without_unicode_are_no_reason_to_fail() -> None:
    """What is opened after that must not become the program's stderr."""
    code = (
        "import os, warnings; from ray_jobs.terminal.lines import complain, open_streams, say; open_streams()\n"
        "opened = os.open(os.devnull, os.O_RDONLY); complain('error: lost'); say(f'{opened > 2} \\u65e5')\n"
        "warnings.warn('\\x1b[31mred')"
    )
    command = f'{sys.executable} -c "$CODE" 2>&- <&-'
    run = subprocess.run(
        ["sh", "-c", command],
        env={"CODE": code, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "True \\u65e5\n")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert run.stdout == "True 日\n"
    assert "error: lost\n" in run.stderr
    assert "UserWarning: \\x1b[31mred" in run.stderr
