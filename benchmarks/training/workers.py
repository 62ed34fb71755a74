"""Two data-parallel workers against one, and against two loops side by side that share nothing.

    uv run python -m benchmarks.training.workers [--rounds 2] [--steps 3] [--json FILE]

For each of DSMIP's experts, MIMIC and pretraining, with the demo's configurations on data drawn on the spot. Workers
are processes of one thread in one gloo group, without Ray (`benchmarks.stage_one` has Ray Train's own cost). In a round
a part is trained by one worker, by two, and by two loops; ratios are of the same round. The bytes are what a worker
sends in a step, as a ring does it.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.data.big_release import positive, prepared_release
from benchmarks.training.steps import WARM_UP, Steps, Stopwatch
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.models import find_system
from dsmip.runs.load_config import changed, load_config
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.pretraining import PairSource, pretrain
from dsmip.training.stages import train_part

PRETRAIN = "pretrain"
PARTS: Mapping[str, str] = {
    "text": "demo",
    "visual": "demo",
    "multimodal": "demo",
    "mimic": "demo_mimic",
    PRETRAIN: "demo",
}
"""Shipped configurations by part."""
WORKERS = 2
_HEADINGS = (
    "part",
    "samples/s, one",
    "two workers",
    "range",
    "two bare loops",
    "of these",
    "CPU of one's",
    "KB sent a step",
)
_IMAGE = 128  # pixels of the pictures' sides
_TRAIN_SHARE = 0.7  # of a drawn release's mentions


@dataclass(frozen=True)
class Task:
    """A part's training by one process. group: the file by which workers meet; None: it trains alone.

    steps: After which it ends.
    """

    part: str
    data: Path
    work: Path
    batch_size: int
    steps: int
    rank: int = 0
    group: Path | None = None


@dataclass
class Trained:
    """Steps of one process, and the bytes that it sent in each."""

    steps: Steps
    bytes_per_step: float


@dataclass
class Rates:
    """One part's figures by round. two, apart: as multiples of one worker's samples a second."""

    one: list[float] = field(default_factory=list)
    two: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: float = 0.0

    def row(self, part: str) -> dict[str, Any]:
        """As in the JSON file: medians over rounds, and their range."""
        return {
            "part": part,
            "samples_per_s": median(self.one),
            "two_workers": median(self.two),
            "two_bare_loops": median(self.apart),
            "of_linear": median(two / apart for two, apart in zip(self.two, self.apart, strict=True)),
            "two_workers_range": [min(self.two), max(self.two)],
            "two_bare_loops_range": [min(self.apart), max(self.apart)],
            "cpu_of_one": median(self.cpu),
            "sent_bytes_per_step": self.sent,
        }


class _Enough(Exception):
    """Ends a training."""


class _Limited(Stopwatch):
    """Ends a training after so many steps."""

    def __init__(self, inner: LocalContext, steps: int, sent: Callable[[], int]) -> None:
        super().__init__(inner)
        self._left, self._sent, self.sent_bytes = steps, sent, list[int]()

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        super().step_done(epoch, step, num_steps, figures)
        self.sent_bytes.append(self._sent())
        self._left -= 1
        if not self._left:
            raise _Enough


def measure(options: argparse.Namespace, work: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each part."""
    mentions = int((options.steps + WARM_UP + 1) * options.batch_size / _TRAIN_SHARE)
    entities = max(300, (options.steps + WARM_UP + 1) * options.batch_size)  # pretraining has a pair for each
    say("writing and preparing a release ...")
    data = prepared_release(entities, mentions, work, _IMAGE)
    found = {part: Rates() for part in options.parts}
    with ExitStack() as stack:
        pools = [stack.enter_context(_process()) for _ in range(WORKERS)]
        for number in range(options.rounds):
            for part, rates in found.items():
                say(f"round {number + 1}: {part}")
                task = partial(Task, part, data, batch_size=options.batch_size, steps=options.steps + WARM_UP)
                _one_round(task, pools, work / f"{part}-{number}", rates)
    return [rates.row(part) for part, rates in found.items()]


def _one_round(task: Callable[..., Task], pools: Sequence[ProcessPoolExecutor], work: Path, rates: Rates) -> None:
    (one,) = _together(pools[:1], [task(work / "one")])
    group = work / "group"
    two = _together(pools, [task(work / f"two-{rank}", rank=rank, group=group) for rank in range(WORKERS)])
    apart = _together(pools, [task(work / f"apart-{rank}") for rank in range(WORKERS)])
    rates.one.append(one.steps.rate)
    rates.two.append(two[0].steps.rate / one.steps.rate)
    rates.apart.append(sum(each.steps.rate for each in apart) / one.steps.rate)
    rates.cpu.append(two[0].steps.step_cpu_s / one.steps.step_cpu_s)
    rates.sent = two[0].bytes_per_step


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _together(pools: Sequence[ProcessPoolExecutor], tasks: Sequence[Task]) -> list[Trained]:
    return [future.result() for future in [pool.submit(train, task) for pool, task in zip(pools, tasks, strict=True)]]


def train(task: Task) -> Trained:
    """Trains until the task's last step, in this process."""
    torch.set_num_threads(1)
    with _joined(task), _counted() as sent:
        context = _Limited(LocalContext(task.work / "checkpoints"), task.steps, lambda: sum(sent))
        with suppress(_Enough):
            _pretrain(task, context) if task.part == PRETRAIN else _train_part(task, context)
    before, after = context.sent_bytes[WARM_UP - 1], context.sent_bytes[-1]
    steps = context.steps()
    return Trained(steps, (after - before) / steps.count)


def _config(task: Task) -> ExperimentConfig:
    """The demo's, with whole batches, and with more epochs than are trained."""
    config = load_config(PARTS[task.part], ["backbone.pretrained=null", "held_out=0"])
    batch = {"batch_size": task.batch_size, "micro_batch_size": None}
    names = find_system(config.model).part_names(config.system)
    pretraining = {"batch_size": task.batch_size, "epochs": task.steps}
    return changed(
        config, {"train": batch, "parts": {name: {"train": batch} for name in names}, "pretrain": pretraining}
    )


def _train_part(task: Task, context: _Limited) -> None:
    train_part(Run.create(task.work / "run", _config(task), Dataset.open(task.data)), task.part, context)


def _pretrain(task: Task, context: _Limited) -> None:
    config, dataset = _config(task), Dataset.open(task.data)
    network = resolve_architecture(config.backbone.architecture)
    template = find_system(config.model).item_format(config.system, "multimodal").template
    backbone = Backbone.build(config.backbone.architecture, None, seed=config.seed)
    pretrain(
        backbone, PairSource(dataset, network, template, config.pretrain, config.seed), config.pretrain, context, seed=0
    )


@contextmanager
def _joined(task: Task) -> Iterator[None]:
    """The process group of the workers, for the time of a training."""
    task.work.mkdir(parents=True, exist_ok=True)
    if task.group is None:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{task.group}", rank=task.rank, world_size=WORKERS)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes that this process sends, one number for each collective."""
    sent: list[int] = []
    others = WORKERS - 1

    def counting(name: str, share: Callable[[Sequence[Any]], float]) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            sent.append(int(share(arguments)))
            return original(*arguments, **options)

        return patch.object(dist, name, call)

    with (
        counting("all_gather", lambda arguments: others * _bytes(arguments[1])),
        counting("all_reduce", lambda arguments: 2 * others / WORKERS * _bytes(arguments[0])),
        counting("all_to_all_single", lambda arguments: _bytes(arguments[1]) - _bytes(arguments[0]) / WORKERS),
    ):
        yield sent


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Table:
    """For people."""
    found = Table(title=f"Two workers of one thread, batches of {options.batch_size}, {options.rounds} rounds")
    for heading in _HEADINGS:
        found.add_column(heading, justify="left" if heading == "part" else "right")
    for row in rows:
        low, high = row["two_workers_range"]
        found.add_row(
            row["part"],
            f"{row['samples_per_s']:.1f}",
            f"{row['two_workers']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['two_bare_loops']:.2f}",
            f"{row['of_linear']:.0%}",
            f"{row['cpu_of_one']:.2f}",
            f"{row['sent_bytes_per_step'] / 1000:,.0f}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the rows."""
    options = _options(arguments)
    with TemporaryDirectory(dir=options.work, prefix="workers-") as work:
        rows = measure(options, Path(work), partial(print, file=sys.stderr, flush=True))
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, options))
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("rounds", "steps", "batch_size")}
        write_json(options.json, {"rows": rows, **settings})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.training.workers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=positive, default=2, help="default: 2")
    parser.add_argument("--steps", type=positive, default=3, help="counted in a training (default: 3)")
    parser.add_argument("--batch-size", type=positive, default=128, help="default: 128, the demo's")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
