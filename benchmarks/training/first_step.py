"""From a command to its first step: `dsmip train` in a process of its own, with marks on the way.

The command is the real one; only its connection to Ray and its loop are wrapped, and each training ends after its first
step. Nothing heavy is imported here, so that the imports measured are the command's own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAGES = ("interpreter", "imports and run folder", "Ray", "workers", "data and weights", "first batch", "first step")
_MARKS = ("started", "ready", "connected", "in the loop", "before the batch", "batch", "step")


def seconds(config: Path, data: Path, run: Path) -> dict[str, float]:
    """Seconds of each of `STAGES` until the first of the parts has made its first step, in the order of time.

    Raises:
        RuntimeError: The command did not get there.
    """
    marks = run.with_name(f"{run.name}.marks")
    options = ["--config", str(config), "--data", str(data), "--run", str(run)]
    code = f"from benchmarks.training.first_step import command; command({str(marks)!r}, {options!r})"
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in marks.read_text().splitlines()] if marks.is_file() else []
    steps = [mark for mark in found if mark["name"] == _MARKS[-1]]
    if not steps:
        raise RuntimeError(f"'dsmip train {' '.join(options)}' made no step:\n{done.stdout}{done.stderr}")
    first = min(steps, key=lambda mark: float(mark["time"]))["part"]
    times = {mark["name"]: mark["time"] for mark in found if mark["part"] in ("", first)}
    ends = [started, *(times[name] for name in _MARKS)]
    return {stage: end - start for stage, start, end in zip(STAGES, ends, ends[1:], strict=False)}


def command(marks: str, options: Sequence[str]) -> None:
    """`dsmip train` with these options; writes marks."""
    _mark(marks, "started")
    sys.argv = ["train_experts.py", *options]
    from unittest.mock import patch

    from ray_jobs import cli
    from ray_jobs.cluster import connection
    from ray_jobs.jobs import train_experts

    @contextmanager
    def connected(**options: Any) -> Iterator[None]:
        _mark(marks, "ready")
        with connection.connected(**options):
            _mark(marks, "connected")
            yield

    with (
        patch.object(train_experts, "connected", connected),
        patch.object(train_experts, "worker_loop", partial(_loop, marks)),
    ):
        cli.run_script("train")  # ends with an error: no part is finished


class _FirstStep(Exception):
    """Ends a training."""


def _loop(marks: str, context: Any, settings: Mapping[str, Any]) -> None:
    from ray_jobs.jobs import train_experts

    part = settings["part"]
    _mark(marks, "in the loop", part)
    of_context = context.step_done

    def step_done(epoch: int, step: int, num_steps: int, figures: Any) -> None:
        now = time.time()
        of_context(epoch, step, num_steps, figures)
        _mark(marks, "before the batch", part, now - figures.seconds)
        _mark(marks, "batch", part, now - figures.seconds + figures.wait_seconds)
        _mark(marks, "step", part, now)
        raise _FirstStep

    context.step_done = step_done
    try:
        train_experts.worker_loop(context, settings)
    except _FirstStep:
        return


def _mark(marks: str, name: str, part: str = "", when: float | None = None) -> None:
    """Adds a line; lines of several processes do not mix, as each is one write."""
    line = json.dumps({"name": name, "part": part, "time": time.time() if when is None else when})
    with Path(marks).open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
