"""Steps of a suite side by side: each a command of dsmip in a process of its own, on one Ray for all of them.

A step begins when what it needs is done and what it asks fits beside what runs; Ray itself gives out the resources, so
that this only keeps commands from waiting in its queue. One that fails takes along what needs it, and nothing else.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dsmip.messages import masked
from dsmip.suites.report import StepFailure
from dsmip.suites.steps import Step
from ray_jobs.terminal.stage_table import StageTable

_LAST_LINES = 12  # of a failed step's log
_POLL_SECONDS, _STOP_SECONDS = 0.2, 20.0
_ERROR = "error: "


@dataclass(frozen=True)
class Room:
    """What steps may ask together, and how many may run at once: each is a process with its own torch."""

    cpu: float
    gpu: float
    most: int

    def fits(self, step: Step, running: Mapping[str, Any], steps: Mapping[str, Step]) -> bool:
        """Whether a step may begin; alone each may, whatever it asks."""
        if not running:
            return True
        together = [step, *(steps[name] for name in running)]
        cpu, gpu = sum(each.cpu for each in together), sum(each.gpu for each in together)
        return len(running) < self.most and cpu <= self.cpu and gpu <= self.gpu


@dataclass
class _Process:
    popen: "subprocess.Popen[bytes]"
    log: Path
    file: IO[bytes]


@dataclass(frozen=True)
class Setting:
    """Where steps run.

    Attributes:
        room: Of this machine or cluster.
        logs: Folder of what the commands print.
        variables: Of their environment.
        program: What their arguments are given to.
    """

    room: Room
    logs: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    program: Sequence[str] = (sys.executable, "-m", "ray_jobs")


def run_steps(steps: Mapping[str, Step], setting: Setting, table: StageTable) -> list[StepFailure]:
    """Runs all steps that are not done yet, each after those that it needs; returns those that failed.

    Args:
        steps: By name; what they need of others is done.
        setting: Where they run.
        table: Shows how far they are; it has all of them.

    Raises:
        KeyboardInterrupt, SystemExit: By SIGINT and SIGTERM, when the steps that ran have been stopped.
    """
    waiting = [name for name, step in steps.items() if not step.done]
    running: dict[str, _Process] = {}
    failures: list[StepFailure] = []
    failed = set[str]()
    with _stopped_at_the_end(running) as leave_if_asked:
        while waiting or running:
            leave_if_asked()
            while doomed := [name for name in waiting if failed.intersection(steps[name].needs)]:
                for name in doomed:
                    waiting.remove(name)
                    failed.add(name)
                    table.set(name, "left out", "what it needs has failed")
            for name in [name for name in waiting if not {*waiting, *running}.intersection(steps[name].needs)]:
                if setting.room.fits(steps[name], running, steps):
                    waiting.remove(name)
                    running[name] = _started(steps[name], setting)
                    table.set(name, "running")
            for name, process in [*running.items()]:
                if (code := process.popen.poll()) is not None:
                    process.file.close()
                    del running[name]
                    if code == 0 and steps[name].done:
                        table.set(name, "done")
                    else:
                        failures.append(_failure(steps[name], process.log, code))
                        failed.add(name)
                        table.set(name, "failed", failures[-1].reason)
            if waiting or running:
                time.sleep(_POLL_SECONDS)
        leave_if_asked()
    return failures


def _started(step: Step, setting: Setting) -> _Process:
    log = setting.logs / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("wb")
    threads = {"OMP_NUM_THREADS": f"{max(1, int(step.cpu))}"} if step.kind == "evaluate" else {}
    popen = subprocess.Popen(
        [*setting.program, *step.arguments],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env={**os.environ, **setting.variables, **threads},
        start_new_session=True,  # an interrupt at the terminal comes to this process alone, which hands it on
        preexec_fn=_ends_with_parent(),
    )
    return _Process(popen, log, file)


def _ends_with_parent() -> Callable[[], None] | None:
    """Makes a child process end when this one is killed: as Ray's own processes do, on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # loaded before the fork, after which little may be done
    set_parent_death_signal = 1
    return lambda: library.prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def _stopped_at_the_end(running: Mapping[str, _Process]) -> Iterator[Callable[[], None]]:
    """Interrupts what still runs when the block is left: by a user, an error, or when this process is terminated.

    Yields what leaves it once a signal has asked for that. An exception by the signal itself would come anywhere: where
    a process has been started that is not in `running` yet, or where Python forks and ignores it.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)

    def leave_if_asked() -> None:
        if signal.SIGINT in asked:
            raise KeyboardInterrupt
        if asked:
            raise SystemExit(128 + asked[0])

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # by nohup and &
    for number in before:
        signal.signal(number, note)
    try:
        yield leave_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running.values():
            _signal(process, signal.SIGINT)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)
            process.popen.wait()
            process.file.close()


def _signal(process: _Process, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)


def _failure(step: Step, log: Path, code: int) -> StepFailure:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if code == 0:
        reason = f"it has not made {next(path for path in step.outcomes if not path.is_file())}"
    elif errors:
        reason = errors[-1]
    else:
        ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        reason = "; ".join([ended, *(line.strip() for line in lines[-1:])])
    return StepFailure(step.name, masked(reason), str(log), tuple(masked(line) for line in lines[-_LAST_LINES:]))
