"""Real trainings that tests disturb: each step is noted in a file, and at given steps the workers wait to be disturbed.

The file also tells afterwards what a disturbance cost: the seconds to the next step, and the steps done twice.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray_heads import wait_until
from workers import run_workers

from dsmip.checkpoints import load_checkpoint
from dsmip.config import ExperimentConfig, parse_config
from dsmip.local import LocalContext
from dsmip.runs import Run
from dsmip.shards import Dataset
from dsmip.stages import CPU, train_part

ROOT = Path(__file__).parents[1]
HOLD_SECONDS = 200.0  # nobody came: the test has failed, and its workers must not stay
Place = tuple[int, int]
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
    def place(self) -> Place:
        return self.epoch, self.step


@dataclass(frozen=True)
class StepLog:
    """The notes of a run's workers. They wait when they first come to one of `holds`, until they are released."""

    folder: Path
    holds: tuple[Place, ...] = ()
    pause: float = 0.0

    def note(self, part: str, epoch: int, step: int, rank: int) -> None:
        """Called by a worker after each step."""
        note = Note(part, epoch, step, rank, os.getpid(), time.time())
        with (self.folder / "steps.jsonl").open("a") as stream:
            stream.write(json.dumps(note.__dict__) + "\n")  # one short write: lines of several workers do not mix
        time.sleep(self.pause)
        mark, released = self.folder / f"{epoch}-{step}.held-{part}-{rank}", self.folder / f"{epoch}-{step}.released"
        if (epoch, step) in self.holds and not mark.exists() and not released.exists():
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

    def wait_held(
        self, place: Place, workers: Mapping[str, int], *, ended: Callable[[], object] = lambda: None
    ) -> None:
        """Returns when all workers (their number by part) wait there; fails when the training has `ended` before."""
        marks = [
            f"{place[0]}-{place[1]}.held-{part}-{rank}" for part, count in workers.items() for rank in range(count)
        ]

        def held() -> bool:
            assert not ended(), f"ended before {place}"
            return all((self.folder / mark).exists() for mark in marks)

        wait_until(held, 120, f"not all of {', '.join(marks)}")

    def to_json(self) -> str:
        return json.dumps({"folder": str(self.folder), "holds": self.holds, "pause": self.pause})

    def release(self, place: Place) -> None:
        (self.folder / f"{place[0]}-{place[1]}.released").touch()

    def cost(self, part: str, event: float, what: str) -> int:
        """Prints what an event at that time cost a part, and returns how many steps were done again."""
        notes = self.notes(part)
        before = {note.place for note in notes if note.time <= event}
        after = [note for note in notes if note.time > event]
        assert after, f"{part} made no step after: {what}"
        repeated = len(before & {note.place for note in after})
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
    from ray_jobs import train_experts

    train_experts._loop(NotingContext(context, log, settings["part"]), settings)  # type: ignore[arg-type]


def noted(log: StepLog) -> Any:
    """What a test puts in the place of `ray_jobs.train_experts._loop`."""
    from ray import cloudpickle

    for module in (__name__, wait_until.__module__, run_workers.__module__):
        cloudpickle.register_pickle_by_value(sys.modules[module])  # workers do not have the tests on their path
    log.folder.mkdir(parents=True, exist_ok=True)
    return partial(noted_loop, log)


def disturbed_config(config: ExperimentConfig, visual_workers: int = 1) -> ExperimentConfig:
    """Two experts: text on cached features, visual with a tower that trains on streamed, changed pictures.

    Small data makes six steps of 4 mentions; there are four epochs.
    """
    experts = {"text": {}, "visual": {"tune": "full"}}
    changes = {
        "train": {"epochs": 4, "batch_size": 4, "schedule": "cosine", "augment": {"shift": 0.2, "drop_pictures": 0.1}},
        "parts": {
            "text": {"resources": {"cpu": 0.5}},
            "visual": {"resources": {"cpu": 0.5}, "workers": visual_workers},
        },
    }
    tree = config.changed(changes).model_dump(mode="json")
    tree["system"] |= {"experts": experts, "use": list(experts)}
    return parse_config(tree)


@contextlib.contextmanager
def train(
    log: StepLog, config: ExperimentConfig, dataset: Dataset, run: Path, variables: Mapping[str, str] = {}
) -> Iterator["subprocess.Popen[str]"]:
    """`dsmip train` in a process of its own, with its steps noted. It is killed when the block is left."""
    path = log.folder / "config.yaml"
    log.folder.mkdir(exist_ok=True)
    path.write_text(config.to_yaml())
    command = [sys.executable, str(ROOT / "tests" / "noted_train.py"), log.to_json(), "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN_")}
    process = subprocess.Popen(
        [*command, "--data", str(dataset.folder), "--run", str(run)],
        cwd=ROOT,
        env={**environment, "RAY_worker_niceness": "0", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Waits for a command's end; its exit code and what it said."""
    output, _ = process.communicate()
    return process.returncode, output


def undisturbed(folder: Path, config: ExperimentConfig, dataset: Dataset) -> Run:
    """The same parts trained by the bare loop, without Ray."""
    run = Run.create(folder / "run", config, dataset)
    for part in run.part_names:
        run_workers(_train_alone, config.part(part).workers, folder / part, run.folder, part)
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
