"""Steps side by side as small programs: their order, their room, and what a failure takes along."""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from dsmip.suites.steps import Step
from ray_jobs.jobs.benching.runner import Room, Setting, run_steps
from ray_jobs.terminal.stage_table import StageTable

# Each step is Python's text, which finds its own file in `out` and all in `folder`.
PROGRAM = (
    "import os, signal, sys; from pathlib import Path; out = Path(sys.argv[1]); folder = out.parent; exec(sys.argv[2])"
)
DONE = "out.write_text('done')"


class Bench:
    """Steps in a folder, and what was said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, dict[str, Step]()
        self.console = Console(file=io.StringIO(), width=200)

    def step(self, name: str, text: str = DONE, needs: Sequence[str] = (), cpu: float = 1.0) -> None:
        path = self.folder / name
        self.steps[name] = Step(name, "train", (str(path), text), tuple(needs), (path,), cpu)

    def run(self, cpu: float = 2.0) -> dict[str, str]:
        """Runs all; returns reasons by failed step."""
        table = StageTable("own", ["train"], self.console)
        for name, step in self.steps.items():
            table.add(name, "row", "train", done=step.done)
        setting = Setting(Room(cpu, 0, 4), self.folder / "logs", program=(sys.executable, "-c", PROGRAM))
        with table:
            return {each.step: each.reason for each in run_steps(self.steps, setting, table)}

    @property
    def said(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_step_begins_when_what_it_needs_is_done(bench: Bench) -> None:
    bench.step("c", f"assert (folder / 'b').is_file(); {DONE}", ["b"])
    bench.step("b", f"assert (folder / 'a').is_file(); {DONE}", ["a"])
    bench.step("a")
    assert bench.run() == {}
    assert all(step.done for step in bench.steps.values())


def test_a_failure_takes_along_what_needs_it_and_nothing_else(bench: Bench) -> None:
    bench.step("bad", "print('working'); print('error: no such thing', file=sys.stderr); sys.exit(2)")
    bench.step("after", needs=["bad"])
    bench.step("later", needs=["after"])
    bench.step("other")
    bench.step("silent", "sys.exit(3)")
    bench.step("killed", "print('last words', flush=True); os.kill(os.getpid(), 9)")
    bench.step("idle", "pass")
    assert bench.run() == {
        "bad": "no such thing",
        "silent": "exit code 3",
        "killed": "ended by signal 9; last words",
        "idle": f"it has not made {bench.folder / 'idle'}",
    }
    assert [name for name, step in bench.steps.items() if step.done] == ["other"]
    assert "later: left out: what it needs has failed" in bench.said
    assert "working" in (bench.folder / "logs" / "bad.log").read_text()


def test_what_is_done_is_not_repeated_and_what_failed_is_tried_again(bench: Bench) -> None:
    bench.step("done", "out.write_text('again')")
    (bench.folder / "done").write_text("before")
    bench.step("bad", f"assert (folder / 'mended').exists(); {DONE}", ["done"])
    assert list(bench.run()) == ["bad"]
    (bench.folder / "mended").touch()
    assert bench.run() == {}
    assert (bench.folder / "done").read_text() == "before"


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT counts: programs that a shell has put into the background ignore it, tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_stops_what_runs(bench: Bench, number: int, raised: type[BaseException]) -> None:
    pid = bench.folder / "pid"
    bench.step(
        "endless",
        "(folder / 'new').write_text(str(os.getpid())); (folder / 'new').rename(folder / 'pid'); signal.pause()",
    )
    bench.step("other", f"while not (folder / 'pid').exists(): pass\nos.kill(os.getppid(), {number}); signal.pause()")
    bench.step("later", needs=["other"])
    with pytest.raises(raised) as left:
        bench.run(cpu=2)
    assert raised is KeyboardInterrupt or left.value.args == (128 + number,)
    assert "interrupted; run the command again to go on" in bench.said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not any(step.done for step in bench.steps.values())


def test_a_signal_that_comes_while_a_step_is_started_is_not_lost(bench: Bench) -> None:
    """Python ignores what is raised while it forks."""
    times = [signal.SIGTERM]

    def send() -> None:
        while times:
            os.kill(os.getpid(), times.pop())

    os.register_at_fork(after_in_parent=send)
    bench.step("only")
    with pytest.raises(SystemExit) as left:
        bench.run()
    assert left.value.code == 128 + signal.SIGTERM


def test_steps_run_side_by_side_where_there_is_room(bench: Bench) -> None:
    """Each waits for the other: alone, neither would end."""
    wait = "out.touch()\nwhile not (folder / '{}').exists(): pass"
    bench.step("one", wait.format("two"))
    bench.step("two", wait.format("one"))
    assert bench.run(cpu=2) == {}


def test_steps_run_one_by_one_where_there_is_none(bench: Bench) -> None:
    """Whoever finds another at work fails; one that asks more than there is runs alone."""
    alone = f"lock = folder / 'lock'; lock.touch(exist_ok=False); lock.unlink(); {DONE}"
    for name in ("one", "two", "three"):
        bench.step(name, alone, cpu=1.5)
    bench.step("large", alone, cpu=64)
    assert bench.run(cpu=2) == {}
