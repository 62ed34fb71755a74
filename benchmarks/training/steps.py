"""The steps of one stage-one training, in a bare process or in workers of Ray Train: what they cost.

Both run `dsmip.training.stages.train_part` on the same batches; what differs is the `Context` and the processes around
it.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from dsmip.config import ExperimentConfig, Running
from dsmip.data.dataset import Dataset
from dsmip.models import find_system
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json
from dsmip.training.local_context import LocalContext
from dsmip.training.loop import Context
from dsmip.training.monitor import StepFigures
from dsmip.training.stages import train_part

WARM_UP = 2  # steps that are not counted: memory is laid out, the first batch waited for


@dataclass(frozen=True)
class Steps:
    """One worker's steps after the warm-up. samples: of all workers. wall_s: from step to step, the context's included.

    cpu_s: of this worker's process. wait_s: for batches. report_s: the end of the epoch, when a checkpoint is handed
    over.
    """

    count: int
    samples: int
    wall_s: float
    cpu_s: float
    wait_s: float
    report_s: float

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.wall_s

    @property
    def step_s(self) -> float:
        return self.wall_s / self.count

    @property
    def step_cpu_s(self) -> float:
        return self.cpu_s / self.count


class Stopwatch:
    """A context that hands everything on to another one and keeps when each step was over."""

    def __init__(self, inner: Context) -> None:
        self._inner, self.device = inner, inner.device
        self._ends: list[tuple[float, float]] = []
        self._figures: list[StepFigures] = []
        self._report_s = 0.0

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        self._inner.step_done(epoch, step, num_steps, figures)
        self._figures.append(figures)
        self._ends.append((time.perf_counter(), time.process_time()))

    def alive(self) -> None:
        self._inner.alive()

    def warn(self, line: str) -> None:
        self._inner.warn(line)

    def features_done(self, done: int, total: int) -> None:
        self._inner.features_done(done, total)

    def asked_to_leave(self) -> bool:
        return self._inner.asked_to_leave()

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        self._inner.step_saved(epoch, step, checkpoint)

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        started = time.perf_counter()
        self._inner.epoch_done(metrics, checkpoint)
        self._report_s = time.perf_counter() - started

    def restore(self) -> Path | None:
        return self._inner.restore()

    def checkpoint_folder(self, epoch: int, step: int) -> Path:
        return self._inner.checkpoint_folder(epoch, step)

    def steps(self) -> Steps:
        """Of one epoch.

        Raises:
            ValueError: It was too short to measure.
        """
        if len(self._ends) <= WARM_UP:
            raise ValueError(f"{len(self._ends)} steps, of which {WARM_UP} are not counted: take more mentions")
        (wall, cpu), (last_wall, last_cpu) = self._ends[WARM_UP - 1], self._ends[-1]
        counted = self._figures[WARM_UP:]
        return Steps(
            len(counted),
            sum(figures.num_samples for figures in counted),
            last_wall - wall,
            last_cpu - cpu,
            sum(figures.wait_seconds for figures in counted),
            self._report_s,
        )


def one_epoch(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with one epoch for every part."""
    names = find_system(config.model).part_names(config.system)
    short = {"epochs": 1, "validate_every": 1}
    return changed(config, {"train": {"validate_every": 1}, "parts": {name: {"train": short} for name in names}})


def bare(config: ExperimentConfig, dataset: Dataset, part: str, work: Path, count: int = 1) -> list[Steps]:
    """An epoch in each of `count` fresh processes of one thread at the same time, without Ray; they share nothing."""
    with (
        TemporaryDirectory(dir=work) as folder,
        ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as processes,
    ):
        runs = [Run.create(Path(folder) / str(number), config, dataset) for number in range(count)]
        return list(processes.map(_bare, [run.folder for run in runs], [part] * count))


def _bare(run: Path, part: str) -> Steps:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    watch = Stopwatch(LocalContext(run / "checkpoints", device))
    train_part(Run.open(run), part, watch)
    return watch.steps()


def in_ray_train(
    config: ExperimentConfig, dataset: Dataset, part: str, work: Path, workers: Sequence[int]
) -> list[Steps]:
    """An epoch for each number of workers, one after the other on one local cluster: the first worker's steps.

    Every worker has one CPU, and a GPU where there are some.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve workers beside whatever else runs
    from ray_jobs.cluster.connection import connected

    with TemporaryDirectory(dir=work) as folder, connected():
        return [_trained(config, dataset, part, Path(folder) / str(count), count) for count in workers]


def _trained(config: ExperimentConfig, dataset: Dataset, part: str, folder: Path, workers: int) -> Steps:
    from ray_jobs.terminal.display import Display
    from ray_jobs.training.ray_train import Training, run_trainings

    run, num_gpus = Run.create(folder / "run", config, dataset), int(torch.cuda.is_available())
    training = Training(
        name=part,
        loop=partial(_in_ray, folder / "steps.json"),
        settings={"run": str(run.folder), "part": part},
        num_epochs=1,
        location=run.trainings,
        plan=Running.model_validate({"workers": workers, "resources": {"cpu": 1, "gpu": num_gpus}}),
    )
    said = StringIO()
    try:
        run_trainings([training], Display(Console(file=said)))
    except Exception:
        print(said.getvalue())
        raise
    return Steps(**json.loads((folder / "steps.json").read_text()))


def _in_ray(out: Path, context: Any, settings: Mapping[str, Any]) -> None:
    from dsmip import distributed

    watch = Stopwatch(context)
    train_part(Run.open(Path(settings["run"])), settings["part"], watch)
    if distributed.rank() == 0:
        write_json(out, asdict(watch.steps()))
