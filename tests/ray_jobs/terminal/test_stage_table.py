"""The live table of works in stages on a real terminal: each row's state, and what remains on the screen."""

import re
from collections.abc import Callable, Mapping, Sequence

import pytest

from tests.support.terminal import OnTerminal, on_terminal

# Reads the works, then a change of a state per line, or how it ends.
PROGRAM = """
import json, sys
from ray_jobs.terminal.lines import complain
from ray_jobs.terminal.stage_table import StageTable

table = StageTable("own suite", ["data", "train", "evaluate"])
for name, row, stage, done in json.loads(sys.stdin.readline()):
    table.add(name, row, stage, done=done)
ways = {"interrupted": KeyboardInterrupt, "terminated": SystemExit}
try:
    with table:
        for line in sys.stdin:
            first, *more = json.loads(line)
            if first == "complain":
                complain(*more)
            elif first in ways:
                raise ways[first](143)
            else:
                table.set(first, *more)
except KeyboardInterrupt:
    sys.exit(130)
"""
WORKS = [
    ("data/small", "small", "data", True),
    ("small/a/seed-0/train", "small A", "train", False),
    ("small/a/seed-1/train", "small A", "train", False),
    ("small/a/seed-0/evaluate-a", "small A", "evaluate", False),
    ("small/b/seed-0/train", "small B", "train", False),
    ("small/b/seed-0/evaluate-b", "small B", "evaluate", False),
]
BORDERS = "┏┡└"


def cells(lines: Sequence[str]) -> dict[str, list[str]] | None:
    """Cells by row, seconds as `#`, of the only table on the screen; None where it is not whole."""
    table = [line for line in lines if line[:1] in ("┃", "│", *BORDERS)]
    if "".join(line[0] for line in table if line[0] in BORDERS) != BORDERS or table[-1][0] != "└":
        return None
    if len({len(line) for line in table}) > 1:  # its last line is still being written, or it is torn
        return None
    rows = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in table if line[0] in "┃│"]
    assert rows[0] == ["own suite", "data", "train", "evaluate", "now"]
    return {name: [re.sub(r"\d+ s", "# s", cell) for cell in others] for name, *others in rows[1:]}


def wait_rows(terminal: OnTerminal, rows: Mapping[str, Sequence[str]]) -> None:
    terminal.wait(lambda lines: cells(lines) == {name: [*row] for name, row in rows.items()})


def showing(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: any(text in line for line in lines)


def test_each_row_shows_its_state_and_the_last_table_alone_remains() -> None:
    data = ["1/1", "", "", ""]
    with on_terminal(PROGRAM) as terminal:
        terminal.tell(*WORKS)
        wait_rows(terminal, {"small": data, "small A": ["", "0/2", "0/1", ""], "small B": ["", "0/1", "0/1", ""]})
        assert not terminal.screen.cursor_shown
        terminal.tell("small/a/seed-0/train", "running")
        terminal.tell("small/b/seed-0/train", "running")
        a = ["", "0/2, 1 running", "0/1", "small/a/seed-0 # s"]
        b = ["", "0/1, 1 running", "0/1", "small/b/seed-0 # s"]
        wait_rows(terminal, {"small": data, "small A": a, "small B": b})
        terminal.tell("small/a/seed-0/train", "done")
        terminal.tell("small/a/seed-1/train", "running")
        terminal.tell("small/a/seed-0/evaluate-a", "running")
        a = ["", "1/2, 1 running", "0/1, 1 running", "small/a/seed-1 # s, small/a/seed-0 # s"]
        wait_rows(terminal, {"small": data, "small A": a, "small B": b})
        terminal.tell("small/b/seed-0/train", "failed", "no such weights")
        terminal.tell("complain", "a library's warning")
        terminal.tell("small/b/seed-0/evaluate-b", "left out", "what it needs has failed")
        b = ["", "0/1, 1 failed", "0/1, 1 left out", ""]
        wait_rows(terminal, {"small": data, "small A": a, "small B": b})
        for name in ("small/a/seed-1/train", "small/a/seed-0/evaluate-a"):
            terminal.tell(name, "done")
        assert terminal.ended() == 0
        assert cells(terminal.screen.lines) == {"small": data, "small A": ["", "2/2", "1/1", ""], "small B": b}
        above, table = terminal.screen.lines[:2], terminal.screen.lines[2:]
        assert re.sub(r"\d+ s", "# s", above[0]) == "  small/b/seed-0/train: failed [# s]: no such weights"
        assert above[1] == "a library's warning"
        assert len(table) == 3 + 3 + 1  # heads, rows, the end
        assert terminal.screen.cursor_shown


@pytest.mark.parametrize(("way", "code"), [("interrupted", 130), ("terminated", 143)])
def test_a_line_below_the_last_table_says_that_the_command_goes_on(way: str, code: int) -> None:
    with on_terminal(PROGRAM) as terminal:
        terminal.tell(*WORKS[:2])
        terminal.tell("small/a/seed-0/train", "running")
        terminal.tell(way)
        assert terminal.ended() == code
        *table, last = terminal.screen.lines
        assert cells(table) == {
            "small": ["1/1", "", "", ""],
            "small A": ["", "0/1, 1 running", "", "small/a/seed-0 # s"],
        }
        assert last == "interrupted; run the command again to go on"
        assert len(table) == 3 + 2 + 1
        assert terminal.screen.cursor_shown


def test_a_table_that_is_larger_than_the_terminal_shows_what_runs_and_is_whole_at_its_end() -> None:
    """While it changes, lines that have left the window cannot be taken back: none may have."""
    names = [f"small/{number}/seed-0/train" for number in range(30)]
    with on_terminal(PROGRAM, columns=60, rows=12) as terminal:
        terminal.tell(*((name, f"small {number}", "train", False) for number, name in enumerate(names)))
        terminal.wait(showing("and 24 more rows"))
        for number in (0, 14, 29):
            terminal.tell(names[number], "running")
            terminal.wait(showing(f"small/{number}/"))
        for number in (0, 14, 29):
            terminal.tell(names[number], "done")
        assert terminal.ended() == 0
        assert cells(terminal.screen.lines) == {
            f"small {number}": ["", "1/1" if number in (0, 14, 29) else "0/1", "", ""] for number in range(len(names))
        }
        assert len(terminal.screen.lines) == 3 + len(names) + 1
