"""Pools of processes: what is interrupted, killed or left alone ends, with one line or none."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.build.runners import Tick, run_in_processes
from dsmip.errors import UserError
from dsmip.parallel import map_tasks
from tests.support.paths import ROOT


@dataclass(frozen=True)
class Hold:
    """Opens a pipe, says that it has begun, and waits for ever."""

    pipe: Path

    def run(self, tick: Tick) -> int:
        with self.pipe.open("wb", 0) as stream:
            stream.write(b"begun")
            signal.pause()
        return 0


def hold(pipe: Path) -> None:
    """A pool that waits for its only task; a process of its own runs it."""
    with run_in_processes(1) as run:
        list(run([Hold(pipe)], lambda count: None))


@dataclass(frozen=True)
class Die:
    def run(self, tick: Tick) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def _die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_process_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"killed .*run the command again"), run_in_processes(1) as run:
        list(run([Die(), Die()], lambda count: None))
    with pytest.raises(UserError, match=r"killed .*fewer --workers"):
        list(map_tasks(_die, [1, 2], 2))


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"from pathlib import Path; from {__name__} import hold; hold(Path({str(pipe)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    with pipe.open("rb") as stream:  # once the task has opened it, too
        assert stream.read(5) == b"begun"
        parent.kill()
        parent.wait()
        assert stream.read() == b""  # comes when the task's process has ended
