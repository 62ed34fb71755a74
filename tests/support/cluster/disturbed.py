"""Real trainings that tests disturb: each step is noted in a file, and at given steps the workers wait to be disturbed.

The file also tells afterwards what a disturbance cost: the seconds to the next step, and the steps done twice.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.checkpoints import load_checkpoint
from dsmip.runs.load_config import changed, parse_config, to_yaml
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import CPU, train_part
from tests.support.cluster.ray_heads import wait_until
from tests.support.paths import ROOT
from tests.support.training.workers import run_workers

NOTED_JOB = "tests.support.cluster.noted_job"
WAIT_SECONDS = 600.0  # of a machine that has much else to do
HOLD_SECONDS = 900.0  # nobody came: the test has failed, and its workers must not stay
Position = tuple[int, int]
"""Epoch and step."""


@dataclass(frozen=True)
class Note:
    """One step that one worker has done. time: of the wall clock."""

    part: str
    epoch: int
    step: int
    rank: int
    pid: int
    time: float

    @property
    def position(self) -> Position:
        return self.epoch, self.step


@dataclass(frozen=True)
class StepLog:
    """The notes of a run's workers. They wait when they first come to one of `holds`, until they are released.

    only: the training that waits; empty: all. pause: seconds after each step. block: where the last worker of a
    streaming part once waits for its batch for ever.
    """

    folder: Path
    holds: tuple[Position, ...] = ()
    only: str = ""
    pause: float = 0.0
    block: Position | None = None

    def note(self, part: str, epoch: int, step: int, rank: int) -> None:
        """Called by a worker after each step."""
        note = Note(part, epoch, step, rank, os.getpid(), time.time())
        with (self.folder / "steps.jsonl").open("a") as stream:
            stream.write(json.dumps(note.__dict__) + "\n")  # one short write: lines of several workers do not mix
        time.sleep(self.pause)
        mark, released = self.folder / f"{epoch}-{step}.held-{part}-{rank}", self.folder / f"{epoch}-{step}.released"
        waits = (epoch, step) in self.holds and self.only in ("", part)
        if waits and not mark.exists() and not released.exists():
            mark.touch()
            deadline = time.monotonic() + HOLD_SECONDS
            while not released.exists():
                assert time.monotonic() < deadline, f"nobody released {part} at {epoch}, {step}"
                time.sleep(0.02)

    def notes(self, part: str, rank: int = 0) -> list[Note]:
        path = self.folder / "steps.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        notes = [Note(**json.loads(line)) for line in lines]
        return [note for note in notes if (note.part, note.rank) == (part, rank)]

    def pids(self, part: str) -> list[int]:
        """Processes of the first worker, in the order of their steps."""
        return list(dict.fromkeys(note.pid for note in self.notes(part)))

    def wait_held(
        self, position: Position, workers: Mapping[str, int], *, ended: Callable[[], object] = lambda: None
    ) -> None:
        """Returns when all workers (their number by part) wait there; fails when the training has `ended` before."""
        marks = [
            f"{position[0]}-{position[1]}.held-{part}-{rank}"
            for part, count in workers.items()
            for rank in range(count)
        ]

        def held() -> bool:
            assert not ended(), f"ended before {position}"
            return all((self.folder / mark).exists() for mark in marks)

        wait_until(held, WAIT_SECONDS, f"not all of {', '.join(marks)}")

    def to_json(self) -> str:
        """For NOTED_JOB."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @staticmethod
    def from_json(text: str) -> "StepLog":
        plan = json.loads(text)
        block = tuple(plan["block"]) if plan["block"] else None
        return StepLog(Path(plan["folder"]), tuple(map(tuple, plan["holds"])), plan["only"], plan["pause"], block)

    def release(self, position: Position) -> None:
        (self.folder / f"{position[0]}-{position[1]}.released").touch()

    @property
    def blocked(self) -> Path:
        """Is there once a worker blocks."""
        return self.folder / "blocked"

    def last_of_process(self, part: str, number: int) -> float:
        """When the part's first process (0), or the one after it (1) ..., did its last step."""
        notes = self.notes(part)
        pid = list(dict.fromkeys(note.pid for note in notes))[number]
        return max(note.time for note in notes if note.pid == pid)

    def cost(self, part: str, event: float, what: str) -> int:
        """Prints what an event at that time cost a part, and returns how many steps were done again."""
        notes = self.notes(part)
        before = {note.position for note in notes if note.time <= event}
        after = [note for note in notes if note.time > event]
        assert after, f"{part} made no step after: {what}"
        repeated = len(before & {note.position for note in after})
        print(f"| {what} | {part} | {after[0].time - event:.1f} s to the next step | {repeated} steps repeated |")
        return repeated


class NotingContext:
    """A training's own context that also notes steps."""

    def __init__(self, context: Any, log: StepLog, part: str) -> None:
        self._context, self._log, self._part = context, log, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def step_done(self, epoch: int, step: int, *more: Any) -> Any:
        from dsmip import distributed

        done = self._context.step_done(epoch, step, *more)
        self._log.note(self._part, epoch, step, distributed.rank())
        return done


def noted_loop(log: StepLog, context: Any, settings: Mapping[str, Any]) -> None:
    """The training's own loop, in a worker."""
    from ray_jobs.jobs import train_experts

    if log.block:
        _block_reading(log)
    train_experts.worker_loop(NotingContext(context, log, settings["part"]), settings)  # type: ignore[arg-type]


def noted_trial(log: StepLog, config: dict[str, int], tasks: Any, events: Any) -> None:
    """A sweep's own trial, in a process of Ray Tune."""
    from ray_jobs.training import sweep, trial

    step_done = trial.TrialContext.step_done

    def noting(context: Any, epoch: int, step: int, *more: Any) -> None:
        step_done(context, epoch, step, *more)
        log.note(f"trial {config['number']}", epoch, step, 0)

    trial.TrialContext.step_done = noting  # type: ignore[assignment, method-assign]
    try:
        sweep.tune_trial(config, tasks, events)
    finally:
        trial.TrialContext.step_done = step_done  # type: ignore[method-assign]  # the process may have other trials


def _block_reading(log: StepLog) -> None:
    from dsmip import distributed

    read = Dataset.training_batches

    def blocking(*arguments: Any, epoch: int, **options: Any) -> Iterator[Any]:
        for batch in read(*arguments, epoch=epoch, **options):
            if (epoch, batch.step) == log.block and distributed.rank() == distributed.world_size() - 1:
                with contextlib.suppress(FileExistsError):
                    log.blocked.touch(exist_ok=False)
                    threading.Event().wait()
            yield batch

    Dataset.training_batches = blocking  # type: ignore[method-assign, assignment]


def noted(log: StepLog, loop: Callable[..., None] = noted_loop) -> Any:
    """Stands in for `ray_jobs.jobs.train_experts.worker_loop`, or for `ray_jobs.training.sweep.tune_trial`."""
    log.folder.mkdir(parents=True, exist_ok=True)
    return partial(loop, log)


def disturbed_config(config: ExperimentConfig, **visual: Any) -> ExperimentConfig:
    """Two experts: text on cached features, visual with a tower that trains on streamed, changed pictures.

    Small data makes six steps of 4 mentions; there are four epochs. visual: what its part has besides.
    """
    experts = {"text": {}, "visual": {"tune": "full"}}
    changes = {
        "train": {"epochs": 4, "batch_size": 4, "schedule": "cosine", "augment": {"shift": 0.2, "drop_pictures": 0.1}},
        "parts": {
            "text": {"resources": {"cpu": 0.5}},
            "visual": {"resources": {"cpu": 0.5}, "checkpoint_steps": 2, **visual},
        },
    }
    tree = changed(config, changes).model_dump(mode="json")
    tree["system"] |= {"experts": experts, "use": list(experts)}
    return parse_config(tree)


def train_arguments(log: StepLog, config: ExperimentConfig, dataset: Dataset, run: Path) -> list[str]:
    """The job that notes steps, and the arguments for `dsmip train`."""
    log.folder.mkdir(exist_ok=True)
    path = log.folder / "config.yaml"
    path.write_text(to_yaml(config))
    options = ["--config", str(path), "--data", str(dataset.folder), "--run", str(run)]
    return ["-m", NOTED_JOB, log.to_json(), "train", *options]


@contextlib.contextmanager
def command(arguments: Sequence[str], variables: Mapping[str, str] = {}) -> Iterator["subprocess.Popen[str]"]:
    """A command in a process of its own. It is killed when the block is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN_")}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        print(process.communicate()[0])  # what `ended` has not read


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Waits for a command's end; its exit code and what it said, which pytest shows when the test fails."""
    assert process.stdout is not None
    output = process.stdout.read()
    print(output)
    return process.wait(), output


def undisturbed(folder: Path, config: ExperimentConfig, dataset: Dataset) -> Run:
    """The same parts trained by the bare loop, without Ray."""
    run = Run.create(folder / "run", config, dataset)
    for part in run.part_names:
        workers = config.part(part).workers.most
        if workers > 1:
            run_workers(_train_alone, workers, folder / part, run.folder, part)
        else:
            torch.set_num_threads(1)
            _train_alone(run.folder, part)
    return run


def _train_alone(folder: Path, part: str) -> int:
    run = Run.open(folder)
    return train_part(run, part, LocalContext(run.training_folder / part)).best_epoch


def assert_equal_parts(found: Run, expected: Run) -> None:
    """The same finished parts to the last bit, and the same last checkpoints: weights, optimizer, schedule, history."""
    for part in expected.part_names:
        assert found.part_report(part) == expected.part_report(part), part
        weights = [(run.folder / part / "weights.safetensors").read_bytes() for run in (found, expected)]
        assert weights[0] == weights[1], f"the weights of {part} differ"
        last = [load_checkpoint(checkpoints(run, part)[-1], CPU) for run in (found, expected)]
        assert _plain(asdict(last[0])) == _plain(asdict(last[1])), f"the last checkpoints of {part} differ"


def checkpoints(run: Run, part: str) -> list[Path]:
    """A part's complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run.training_folder / part).glob("*/checkpoint.json"))


def wait_stored(folder: Path, positions: Mapping[str, Position]) -> None:
    """Returns when the newest checkpoint of each part that Ray knows in the run's folder is of that epoch and step."""

    def newest(part: str) -> Position | None:
        storage = folder / "ray" / part
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((storage / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
            manifest = json.loads((storage / known[-1]["checkpoint_dir_name"] / "checkpoint.json").read_text())
            return manifest["epoch"], manifest["step"]
        return None

    wait_until(
        lambda: all(newest(part) == position for part, position in positions.items()),
        WAIT_SECONDS,
        f"{positions} not stored",
    )


def _plain(value: Any) -> Any:
    """Nested dictionaries and lists with numbers in the place of tensors, so that == compares them."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def descendants(pid: int) -> list[int]:
    """Ids of all living processes that a process has started, and those have started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
