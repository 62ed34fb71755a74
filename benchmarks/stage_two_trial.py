"""A trial of stage two on cached features, against the same trial that first encodes all items itself.

Encoding once per trial is the least that a search without a cache can do; encoding every batch anew costs that once
more in every epoch.
"""

import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dsmip.config import ExperimentConfig
from dsmip.features import load_features, whole_features
from dsmip.local import LocalContext
from dsmip.manifest import KB
from dsmip.part_features import PartFeatures
from dsmip.runs import Run
from dsmip.shards import Dataset
from dsmip.stages import SplitFeatures, gold_rows, stage_two_split, start_whole, train_whole

_SPLITS = ("train", "validation", KB)


@dataclass(frozen=True)
class Trial:
    """Seconds of a trial up to the end of `epochs`, its encoding included where it had to, and its losses."""

    epochs: int
    wall_s: float
    cpu_s: float
    losses: tuple[float, ...]


def trials(config: ExperimentConfig, dataset: Dataset, work: Path) -> tuple[Trial, Trial]:
    """The trial that encodes, and the one that finds what that has left; experts have random weights.

    Raises RuntimeError when the two did not train alike.
    """
    with TemporaryDirectory(dir=work) as folder:
        run = Run.create(Path(folder) / "run", config, dataset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for part in run.part_names:
                run.save_part(part, run.system.build_part(part, config, with_encoder=True), {})
        encoding, cached = (_in_a_process(run.folder) for _ in range(2))
    if encoding.losses != cached.losses:
        raise RuntimeError(f"losses with cached features {cached.losses}, without {encoding.losses}")
    return encoding, cached


def _in_a_process(run: Path) -> Trial:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_trial, run).result()


def _trial(folder: Path) -> Trial:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    run = Run.open(folder)
    config, parts = run.config, run.system.feature_parts(run.config.system)
    of_part = {part: PartFeatures(run, part, config) for part in parts}
    tables = {
        split: whole_features({part: load_features(of_part[part].files(split, device)) for part in parts}, parts)
        for split in _SPLITS
    }
    if device.type == "cuda":
        tables = {split: table.to(device) for split, table in tables.items()}
    epochs = config.tune.rungs[0]
    result = train_whole(
        start_whole(run, config).to(device),
        stage_two_split(run, tables["train"]),
        SplitFeatures(tables["validation"], gold_rows(run.dataset, "validation")),
        tables[KB],
        config.tune_train(),
        LocalContext(folder / "trial", device),
        seed=config.seed,
        stop_epoch=epochs,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shutil.rmtree(folder / "trial")
    return Trial(epochs, wall, cpu, tuple(metrics["loss"] for metrics in result.history))
