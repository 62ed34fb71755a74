"""The one display of all commands: plain lines without a terminal, bars on one."""

import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from dsmip.progress import Progress
from ray_jobs.terminal.display import Display


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


def test_counts_are_plain_lines_at_the_end_and_every_thirty_seconds(clock: Clock) -> None:
    out = StringIO()
    with Display(Console(file=out)) as display:
        progress: Progress = display
        progress("kb", 1, 90)
        clock.now = 29.0
        progress("kb", 2, 90)
        clock.now = 30.0
        progress("kb", 3, 90)
        progress("reading mentions", 5, 0)
        clock.now = 61.0
        progress("reading mentions", 7, 0)
        progress("kb", 90, 90)
        progress("kb", 90, 90)
    assert out.getvalue().split("\n") == [
        "  kb           3 of 90  0.0667/s, 22 min left  [30 s]",
        "  reading mentions 7  [61 s]",
        "  kb           90  [61 s]",
        "",
    ]


def test_the_pace_counts_from_where_a_work_goes_on(clock: Clock) -> None:
    out = StringIO()
    with Display(Console(file=out)) as display:
        display.show_steps("linked", 0, 1, 0, {})  # a worker has started
        clock.now = 10.0
        display.show_steps("linked", 500, 1000, 0, {})
        clock.now = 40.0
        display.show_steps("linked", 530, 1000, 0, {})
    assert out.getvalue() == "  linked       530 of 1000  1/s, 8 min left  [40 s]\n"


def test_trainings_are_lines_at_epochs_ends_and_every_thirty_seconds(clock: Clock) -> None:
    out = StringIO()
    with Display(Console(file=out)) as display:
        assert display.started == set()
        display.show_steps("text", 0, 12, 0, {})
        assert display.started == {"text"}
        clock.now = 31.0
        display.show_steps("text", 5, 12, 0, {})
        display.show_steps("text", 6, 12, 0, {"loss": 0.25, "mrr": 0.5, "hits@1": 0.125, "seconds": 9.0})
        display.say("[a line] as it is")
    assert out.getvalue().split("\n") == [
        "  text         5 of 12  0.161/s, 43 s left  [31 s]",
        "  text         epoch   1  loss 0.250  mrr 0.500  hits@1 0.125  [31 s]",
        "[a line] as it is",
        "",
    ]
    with display:
        assert display.started == set()


def test_a_terminal_has_bars(clock: Clock) -> None:
    out = StringIO()
    with Display(Console(file=out, force_terminal=True, width=100)) as display:
        display("kb", 45, 90)
        display.show_steps("text", 6, 12, 0, {"loss": 0.25})
        display.say("between")
    shown = out.getvalue()
    assert "45/90" in shown
    assert "epoch 1  loss 0.250" in shown
    assert "between\n" in shown
    assert "[0 s]" not in shown


def test_an_interrupted_command_says_that_it_goes_on() -> None:
    out = StringIO()
    with pytest.raises(KeyboardInterrupt), Display(Console(file=out)):
        raise KeyboardInterrupt
    assert out.getvalue() == "interrupted; run the command again to go on\n"


def test_progress_of_a_command_with_a_result_is_no_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(transient=True) as display:
        display("shards", 5, 5)
    display.console.print("a result")
    said = capsys.readouterr()
    assert said.out == "a result\n"
    assert said.err == "  shards       5  [0 s]\n"


def test_it_knows_no_ray() -> None:
    code = "import sys, ray_jobs.terminal.display; print('ray' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
