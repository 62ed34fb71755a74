"""One trial of a sweep: the gated system trained on shared feature tables, in a process of Ray Tune."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import load_features, whole_features
from dsmip.errors import StoreAway
from dsmip.evaluation.experts.survey import KeptScores
from dsmip.evaluation.preparation import with_has_image
from dsmip.runs.load_config import read_config
from dsmip.runs.loaded_model import WEIGHTS
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.runs.status import PROGRESS
from dsmip.runs.weights import own_weights, save_weights
from dsmip.storage.locations import open_run_storage
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import RunStorage
from dsmip.training.fusion.fit import FitScores
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.stages import stage_two_split, start_whole, train_whole
from dsmip.training.trackers import SEND_SECONDS, Watched
from dsmip.training.validation.validation import SplitFeatures
from ray_jobs.cluster.events import StepEvents
from ray_jobs.cluster.failures import failure_of, traced
from ray_jobs.cluster.tasks import start_share
from ray_jobs.cluster.workers import set_threads, worker_device
from ray_jobs.training.context import open_watch

SPLITS = ("train", "validation", KB)
RESULT = "result.json"
_CHECKPOINTS = "checkpoints"
_GPU_SHARE = 0.5  # of the free memory: tables up to this size are moved there whole


@dataclass(frozen=True)
class PartTables:
    """The files of a part's feature tables: by split, as the cache calls them, and those beside its shards.

    Attributes:
        cached: Addresses (`FeatureCache.address`).
        num_bytes: By path.
        beside: The folder of those beside the shards.
    """

    cached: Mapping[str, str]
    stored: Mapping[str, Sequence[str]]
    num_bytes: Mapping[str, int]
    beside: str | None


@dataclass(frozen=True)
class TrialTask:
    """A trial to bring up to `stop_epoch`.

    Attributes:
        root: The run's location.
        data: Its data's.
        features: By part.
    """

    number: int
    root: str
    data: str
    config: str
    stop_epoch: int
    features: Mapping[str, PartTables]

    @property
    def storage(self) -> RunStorage:
        """The trial's own."""
        return open_run_storage(self.root) / trial_name(self.number)


def trial_name(number: int) -> str:
    """Where a trial's files are, below the run."""
    return f"tune/trials/{number}"


def cache_features(root: str, data: str, config: str, part: str, name: str, events: Any) -> PartTables:
    """Computes a part's features of the splits that trials need. Progress goes to `events` under `name`."""
    step_events = start_share(name, events)
    run = Run.open(root, data)
    total = run.dataset.num_entities + sum(run.dataset.num_mentions(split) for split in SPLITS if split != KB)
    done_of: dict[str, int] = {}

    def count(what: str, done: int, _: int) -> None:
        done_of[what] = done
        step_events.step_done(0, sum(done_of.values()) - 1, total)

    settings, device = read_config(config), worker_device()
    features = PartFeatures(run.home(part, settings), part, settings)
    files = {split: features.files(split, device, count, step_events.warn) for split in SPLITS}
    cache = features.home.cache
    cached = {split: cache.address(paths[0]) for split, paths in files.items()}
    stored = {split: [_name(path, run.dataset.folder) for path in paths[1:]] for split, paths in files.items()}
    sizes = {str(path.resolve()): path.stat().st_size for paths in files.values() for path in paths}
    return PartTables(cached, stored, sizes, str(features.beside) if features.beside else None)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def run_trial(task: TrialTask, events: Any) -> dict[str, Any]:
    """Trains from the trial's own checkpoint to `stop_epoch`, writes weights, then `result.json`, which is returned.

    A trial that has come so far before is left as it is.
    """
    set_threads()
    run, config = Run.open(task.root, task.data), read_config(task.config)
    if done := _finished(task):
        return done
    settings, storage, device = config.tune_train(), task.storage, worker_device()
    paths = {part: files_here(run, config, part, task.features[part], device) for part in task.features}
    parts = run.system.feature_parts(config.system)
    tables = load_tables(json.dumps(paths), parts, str(device), run.dataset.location)
    matcher = start_whole(run, config).to(device)
    with TrialContext(task, run.storage, config, settings.epochs, events, device) as context:
        result = train_whole(
            matcher,
            stage_two_split(run, tables["train"]),
            SplitFeatures(tables["validation"], gold_rows(run.dataset, "validation")),
            with_has_image(tables[KB], run.dataset),
            run.dataset,
            settings,
            context,
            seed=config.seed,
            stop_epoch=task.stop_epoch,
            kept=kept_scores(json.dumps([task.root, paths, config.system.model_dump(mode="json", exclude={"gate"})])),
        )
    with storage.atomic(WEIGHTS) as temporary:
        save_weights(temporary, own_weights(matcher))
    report = {"epochs": task.stop_epoch, "best": result.best, "history": result.history}
    storage.write_json(RESULT, report)
    return report


def _finished(task: TrialTask) -> dict[str, Any] | None:
    """What was reported when the trial came to `stop_epoch`, or None. The run's small files must be up to date."""
    path = task.storage.folder / RESULT
    if not path.is_file():
        return None
    epochs, report = read_json(path, lambda it: (it["epochs"], it), f"; delete {task.storage} to train it anew")
    return report if epochs == task.stop_epoch else None


def files_here(
    run: Run, config: ExperimentConfig, part: str, tables: PartTables, device: torch.device
) -> dict[str, list[str]]:
    """A part's files by split on this node, which need not be the one that computed them.

    What another command has removed since is computed again.
    """
    files, home = {}, run.home(part, config)
    for split in SPLITS:
        cached = home.cache.opened(tables.cached[split])
        stored = [run.dataset.folder / name for name in tables.stored[split]]
        if cached is None:
            paths = PartFeatures(home, part, config).files(split, device)
        elif not all(path.is_file() for path in stored):
            paths = [cached, *PartFeatures(home, part, config).files_beside(split)]
        else:
            paths = [cached, *stored]
        files[split] = [str(path.resolve()) for path in paths]
    return files


class TrialContext(LocalContext):
    """A trial's outside world: checkpoints in its own folder, events for the driver, and its watch."""

    def __init__(
        self,
        task: TrialTask,
        run: RunStorage,
        config: ExperimentConfig,
        num_epochs: int,
        events: Any,
        device: torch.device,
    ) -> None:
        name = f"trial {task.number}"
        self._events = StepEvents(name, num_epochs, events)
        self._storage, self._sent, self._away = task.storage, time.monotonic(), False
        super().__init__(self._storage.folder / _CHECKPOINTS, device, warn=self._events.warn)
        watched = Watched(run, name, config.watch, config.model_dump(mode="json"))
        self._watch = open_watch(watched, device, num_epochs, (self._storage, PROGRESS), self._events)
        self.alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._watch.close("failed" if kind else "finished")
        if kind is None:
            self._storage.replace(_CHECKPOINTS)

    def alive(self) -> None:
        self._watch.alive()

    @property
    def where(self) -> str:
        return str(self._storage / _CHECKPOINTS)

    def restore(self) -> Path | None:
        self._storage.pull(_CHECKPOINTS)
        return super().restore()

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        self._events.step_done(epoch, step, num_steps)
        self._watch.step_done(epoch, step, num_steps, figures)

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        super().step_saved(epoch, step, checkpoint)
        self._send()

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        super().epoch_done(metrics, checkpoint)
        self._send()
        self._events.epoch_done(metrics)
        self._watch.epoch_done(metrics)

    def _send(self) -> None:
        """Not after every epoch, which may take less than a second. A store that is away is tried again later."""
        if time.monotonic() - self._sent < SEND_SECONDS:
            return
        try:
            self._storage.replace(_CHECKPOINTS)
            self._away = False
        except StoreAway:
            if not self._away:
                self._events.warn(f"warning: {self._storage} cannot be reached; checkpoints are sent there later")
            self._away = True
        self._sent = time.monotonic()


def guarded_trial(task: TrialTask, events: Any) -> dict[str, Any]:
    """The `mrr` of `run_trial`; or an error as a result, the fields of a `failure`: the other trials go on."""
    try:
        return {"mrr": run_trial(task, events)["best"]["mrr"]}
    except Exception as error:
        failure = failure_of(error, task.storage)
        where = traced(failure, task.storage, "error.txt")
        return {"failure": asdict(replace(failure, message=f"{failure.message}{where}", trace=""))}


@lru_cache(maxsize=1)
def kept_scores(experts: str) -> FitScores:
    """Room for experts' scores, which trials that differ in their gates alone share in a process.

    Args:
        experts: All that the scores depend on.
    """
    return KeptScores(), KeptScores()


@lru_cache(maxsize=2)
def load_tables(features: str, parts: tuple[str, ...], device: str, data: str) -> dict[str, Table]:
    """The whole system's tables by split, memory-mapped; on a GPU they are moved there when they fit."""
    paths: dict[str, dict[str, list[str]]] = json.loads(features)
    dataset, tables = Dataset.open(data), {}
    for split in SPLITS:
        kept = dataset.kept.get(split)
        of_part = {part: load_features(map(Path, paths[part][split]), kept) for part in parts}
        tables[split] = whole_features(of_part, parts)
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info()
        if sum(table.num_bytes for table in tables.values()) < _GPU_SHARE * free:
            return {split: table.to(torch.device(device)) for split, table in tables.items()}
    return tables
