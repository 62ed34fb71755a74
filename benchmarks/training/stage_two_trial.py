"""A trial of stage two on cached features, against the same trial without a cache.

Without a cache the frozen encoders run on every batch anew; the least that a search without one could do is to encode
all items once in each trial. All three train on the same batches.
"""

import multiprocessing
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.collate import gold_rows
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import load_features, whole_features
from dsmip.evaluation.preparation import with_has_image
from dsmip.runs.load_config import changed
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.training.batches import CachedSource, Step
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import stage_two_split, start_whole, train_whole
from dsmip.training.trainer import train
from dsmip.training.validation.validation import CachedValidation, SplitFeatures

_SPLITS = ("train", "validation", KB)
_TOLERANCE = 1e-3  # of losses: a text's batch decides its padding, and so the last bits of its features; a GPU adds
# in any order


@dataclass(frozen=True)
class Trial:
    """Seconds of a trial up to the end of `epochs`, its encoding included where it had to, and its losses."""

    epochs: int
    wall_s: float
    cpu_s: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Trials:
    """once: all items are encoded first. cached: they were before. anew: every batch is encoded when it comes."""

    once: Trial
    cached: Trial
    anew: Trial


def trials(config: ExperimentConfig, dataset: Dataset, work: Path) -> Trials:
    """Each trial in a fresh process of one thread; experts have random weights.

    A gate that fuses learns from whole rankings, of cached features only: the paper's form takes its place.

    Raises:
        RuntimeError: They did not train alike.
    """
    if config.system.gate.fuses:
        space = {"system.gate.scoring": {"values": ["choice"]}}
        config = changed(config, {"system": {"gate": {"preset": "paper"}}, "tune": {"space": space}})
    with TemporaryDirectory(dir=work) as folder:
        run = untrained_run(Path(folder) / "run", config, dataset)
        found = Trials(*(_in_a_process(run.folder, anew=anew) for anew in (False, False, True)))
    once, cached, anew = (torch.tensor(trial.losses) for trial in (found.once, found.cached, found.anew))
    if not all(torch.allclose(losses, cached, rtol=_TOLERANCE) for losses in (once, anew)):
        raise RuntimeError(f"the losses of three equal trials differ: {once}, {cached}, {anew}")
    return found


def untrained_run(folder: Path, config: ExperimentConfig, dataset: Dataset) -> Run:
    """A run whose parts are finished, with random weights."""
    run = Run.create(folder, config, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for part in run.part_names:
            run.save_part(part, run.system.build_part(part, config, with_encoder=True), {})
    return run


class EncodingSource:
    """The batches that a `CachedSource` would give, every item of them encoded when it comes."""

    hard_row_NK: Tensor | None = None

    def __init__(self, run: Run, device: torch.device) -> None:
        config, data = run.config, run.dataset
        mentions, entities = (_row_numbers(count) for count in (data.num_mentions("train"), data.num_entities))
        self._order = CachedSource(mentions, entities, gold_rows(data, "train"), config.tune_train(), config.seed)
        self._parts = run.system.feature_parts(config.system)
        self._encoders = {part: run.load_encoder(part, config).to(device) for part in self._parts}
        self._collators = {part: run.collator(part) for part in self._parts}
        self._data, self._mentions, self._device = data, list(data.mentions("train")), device

    def num_steps(self) -> int:
        return self._order.num_steps()

    def steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        for step in self._order.steps(epoch, start):
            assert isinstance(step.mentions, Table)
            mentions = self._encoded_mentions(step.mentions.dense("row").tolist())
            yield Step(mentions, self._encoded_entities(step.entity_row_E.tolist()), step.gold_row_M, step.entity_row_E)

    @torch.no_grad()
    def _encoded_mentions(self, rows: Sequence[int]) -> Table:
        mentions = [self._mentions[row] for row in rows]
        tables = {
            part: encoder.encode_mentions(self._collators[part].mentions(mentions).to(self._device))
            for part, encoder in self._encoders.items()
        }
        return whole_features(tables, self._parts)

    @torch.no_grad()
    def _encoded_entities(self, rows: Sequence[int]) -> Table:
        entities = [self._data.entity(row) for row in rows]
        tables = {
            part: encoder.encode_entities(self._collators[part].entities(entities).to(self._device))
            for part, encoder in self._encoders.items()
        }
        return whole_features(tables, self._parts)


def _row_numbers(count: int) -> Table:
    return Table({"row": torch.arange(count)})


def _in_a_process(run: Path, *, anew: bool) -> Trial:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_trial, run, anew=anew).result()


def _trial(folder: Path, *, anew: bool) -> Trial:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    run = Run.open(folder)
    matcher, context = start_whole(run, run.config).to(device), LocalContext(folder / "trial", device)
    tables = _tables(run, device)  # the one that encodes batches anew still validates on these
    kb = with_has_image(tables[KB], run.dataset)
    validation = SplitFeatures(tables["validation"], gold_rows(run.dataset, "validation"))
    settings, epochs, seed = run.config.tune_train(), run.config.tune.rungs[0], run.config.seed
    if anew:
        validate = CachedValidation(validation, kb, context)
        source = EncodingSource(run, device)
        result = train(matcher, source, settings, context, validate, seed=seed, stop_epoch=epochs)
    else:
        split = stage_two_split(run, tables["train"])
        result = train_whole(
            matcher, split, validation, kb, run.dataset, settings, context, seed=seed, stop_epoch=epochs
        )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shutil.rmtree(folder / "trial")
    return Trial(epochs, wall, cpu, tuple(metrics["loss"] for metrics in result.history))


def _tables(run: Run, device: torch.device) -> dict[str, Table]:
    """The whole system's features by split, encoded where no file has them."""
    parts = run.system.feature_parts(run.config.system)
    of_part = {part: PartFeatures(run, part, run.config) for part in parts}
    tables = {
        split: whole_features({part: load_features(of_part[part].files(split, device)) for part in parts}, parts)
        for split in _SPLITS
    }
    return tables if device.type == "cpu" else {split: table.to(device) for split, table in tables.items()}
