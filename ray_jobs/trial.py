"""One trial of a sweep: the gated system trained on shared feature tables, in a process of Ray Tune."""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from dsmip.checkpoints import save_weights
from dsmip.config import ExperimentConfig
from dsmip.errors import UserError
from dsmip.features import load_features, whole_features
from dsmip.files import write_json, write_text
from dsmip.local import LocalContext
from dsmip.manifest import KB
from dsmip.part_features import PartFeatures
from dsmip.runs import Run, own_weights
from dsmip.stages import SplitFeatures, gold_rows, stage_two_split, start_whole, train_whole
from dsmip.table import Table
from dsmip.watch import StepFigures
from dsmip.watch_tools import PROGRESS, Watched
from ray_jobs.context import StepEvents, open_watch, set_threads, worker_device
from ray_jobs.settings import read_config

SPLITS = ("train", "validation", KB)
FeaturePaths = Mapping[str, Mapping[str, Sequence[str]]]
_GPU_SHARE = 0.5  # of the free memory: tables up to this size are moved there whole


@dataclass(frozen=True)
class TrialTask:
    """A trial to bring up to `stop_epoch`. `features` are the tables' files by part and split; `folder` is its own."""

    number: int
    root: str
    config: str
    folder: str
    stop_epoch: int
    features: FeaturePaths


def cache_features(root: str, config: str, part: str, name: str, events: Any) -> dict[str, list[str]]:
    """Computes what a part's encoder says of the splits that trials need; returns the tables' files by split.

    Progress goes to `events` under `name`.
    """
    set_threads()
    run = Run.open(Path(root))
    told = StepEvents(name, 1, events)
    total = run.dataset.num_entities + sum(run.dataset.num_mentions(split) for split in SPLITS if split != KB)
    done_of: dict[str, int] = {}

    def count(what: str, done: int, _: int) -> None:
        done_of[what] = done
        told.step_done(0, sum(done_of.values()) - 1, total)

    settings, device = read_config(config), worker_device()
    features = PartFeatures(run.home(part, settings), part, settings)
    return {split: [str(path.resolve()) for path in features.files(split, device, count)] for split in SPLITS}


def run_trial(task: TrialTask, events: Any) -> dict[str, Any]:
    """Trains from the trial's own checkpoint to `stop_epoch`, writes weights, then `result.json`, which is returned."""
    set_threads()
    run, config = Run.open(Path(task.root)), read_config(task.config)
    settings, folder, device = config.tune_train(), Path(task.folder), worker_device()
    tables = _load_tables(json.dumps(task.features), run.system.feature_parts(config.system), str(device))
    matcher = start_whole(run, config).to(device)
    with TrialContext(task, run.folder, config, settings.epochs, events, device) as context:
        result = train_whole(
            matcher,
            stage_two_split(run, tables["train"]),
            SplitFeatures(tables["validation"], gold_rows(run.dataset, "validation")),
            tables[KB],
            settings,
            context,
            seed=config.seed,
            stop_epoch=task.stop_epoch,
        )
    save_weights(folder / "weights.safetensors", own_weights(matcher))
    report = {"epochs": task.stop_epoch, "best": result.best, "history": result.history}
    write_json(folder / "result.json", report)
    return report


class TrialContext(LocalContext):
    """A trial's outside world: checkpoints in its own folder, events for the driver, and its watch."""

    def __init__(
        self, task: TrialTask, run: Path, config: ExperimentConfig, num_epochs: int, events: Any, device: torch.device
    ) -> None:
        folder, name = Path(task.folder), f"trial {task.number}"
        self._told = StepEvents(name, num_epochs, events)
        super().__init__(folder / "checkpoints", device, warn=self._told.warn)
        watched = Watched(run, name, config.watch, config.model_dump(mode="json"))
        self._watch = open_watch(watched, device, num_epochs, folder / PROGRESS, self._told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._watch.close("failed" if kind else "finished")

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        self._told.step_done(epoch, step, num_steps)
        self._watch.step_done(epoch, step, num_steps, figures)

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        super().epoch_done(metrics, checkpoint)
        self._told.epoch_done(metrics)
        self._watch.epoch_done(metrics)


def guarded_trial(task: TrialTask, events: Any) -> dict[str, Any]:
    """`run_trial`, with an error as a result: the other trials go on."""
    try:
        return {"mrr": run_trial(task, events)["best"]["mrr"]}
    except UserError as error:
        return {"failure": str(error), "user_error": True}
    except Exception as error:
        log = Path(task.folder) / "error.txt"
        write_text(log, traceback.format_exc())
        return {"failure": f"{type(error).__name__}: {error} (see {log})", "user_error": False}


@lru_cache(maxsize=2)
def _load_tables(features: str, parts: tuple[str, ...], device: str) -> dict[str, Table]:
    """The whole system's tables by split, memory-mapped; on a GPU they are moved there when they fit."""
    paths: FeaturePaths = json.loads(features)
    tables = {
        split: whole_features({part: load_features(map(Path, paths[part][split])) for part in parts}, parts)
        for split in SPLITS
    }
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info()
        if sum(table.num_bytes for table in tables.values()) < _GPU_SHARE * free:
            return {split: table.to(torch.device(device)) for split, table in tables.items()}
    return tables
