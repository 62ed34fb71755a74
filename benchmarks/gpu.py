"""Benchmark of a GPU: kernels, ranking, training, stage two and linking by one command, without a network.

    python -m benchmarks.gpu [--json FILE] [--seconds 480] [--section ranking]

At most eight minutes. Each section has a process of its own, within what is left of the time; one that fails stops no
other:

tests     the tests of the kernels, of all backends, and of a training that resumes within the tolerance of GPUs
ranking   WikiMEL's test set (5,169 mentions, 109,976 entities, random features) ranked whole; on a part of it against
          the published logic on the same device, with ranks compared to float64 and shares of the device's rates
step      a step of the multimodal expert, ViT-B/32, batches of 128, bf16, compiled or not
training  an epoch of the multimodal expert on drawn pictures: samples a second, share of waiting for data
trial     a trial of stage two with and without cached features
linking   one mention at a time, and many, with a model of random weights

Ray is not needed. Without a GPU everything runs at sizes of seconds: a rehearsal, whose figures say nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

import dsmip
from benchmarks.data.big_release import prepared_release
from benchmarks.ranking.against_published import available_backends
from benchmarks.ranking.cases import CASES, Case
from benchmarks.ranking.contest import Sizes, rank_ours, ready_to_rank, run_case
from benchmarks.roofline import device_rates
from benchmarks.training.stage_two_trial import trials, untrained_run
from benchmarks.training.steps import bare, one_epoch
from benchmarks.training.tower_rate import tower_rates
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.planning.probing.measure import measured
from dsmip.runs.load_config import changed, load_config
from dsmip.storage.atomic import write_json

TESTS = ("tests/ops/kernels/test_cuda.py", "tests/units/test_text_unit_backends.py", "tests/training/test_stage_one.py")
GOALS = {"mimic-40": 2.0, "dsmip-padded": 3.0, "dsmip-ragged": 0.6}
"""Seconds to rank WikiMEL's test set on an H200, by case."""
WHOLE = (
    *(CASES[name] for name in GOALS),
    Case("dsmip-mixture", "dsmip", 77, masked=True, scoring="mixture"),
    Case("mmoe-40", "mmoe", 40),
)


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of this command. whole: mentions and entities of a ranking. part: those against float64."""

    whole: tuple[int, int]
    part: Sizes
    tower: tuple[str, int, str]
    entities: int
    mentions: int
    links: int


FULL = Scale((5169, 109_976), Sizes(128, 16_384, 16_384, 3), ("ViT-B-32", 128, "bf16"), 1024, 2048, 200)
REHEARSAL = Scale((6, 48), Sizes(4, 32, 16, 1), ("tiny", 4, "fp32"), 24, 40, 4)


@dataclass(frozen=True)
class Figure:
    """One line of the table. goal: what the figure should reach (seconds: at most), if something is asked of it."""

    section: str
    what: str
    value: float
    unit: str
    goal: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all sections (or those named), prints a table and writes the figures; exit code 1 if a section failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all sections together (default: 480)")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated (default: all)")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)  # of the processes that this one starts
    options = parser.parse_args(arguments)
    if options.only:
        write_json(options.json, {"figures": [asdict(each) for each in SECTIONS[options.only]()]})
        return
    figures, failures = _all(options.section or list(SECTIONS), options.seconds)
    _show(figures, failures)
    if options.json is not None:
        machine = {"device": _device_name(), "torch": torch.__version__, "rehearsal": _scale() is REHEARSAL}
        write_json(options.json, {**machine, "figures": [asdict(each) for each in figures], "failures": failures})
    if failures:
        sys.exit(1)


def _all(names: Sequence[str], seconds: float) -> tuple[list[Figure], dict[str, str]]:
    """Figures of all sections, and why some have none."""
    end, figures, failures = time.monotonic() + seconds, [], {}
    with TemporaryDirectory(prefix="gpu-") as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            out, left = Path(folder) / f"{name}.json", end - time.monotonic()
            command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--json", str(out)]
            try:
                subprocess.run(command, check=True, timeout=max(left, 1.0))
            except subprocess.TimeoutExpired:
                failures[name] = f"was stopped: {left:.0f} s were left of --seconds"
            except subprocess.CalledProcessError as error:
                failures[name] = f"ended with exit code {error.returncode}; what it said stands above"
            else:
                figures += [Figure(**each) for each in json.loads(out.read_text())["figures"]]
    return figures, failures


def _show(figures: Sequence[Figure], failures: Mapping[str, str]) -> None:
    what = "a rehearsal: these figures say nothing" if _scale() is REHEARSAL else _device_name()
    table = Table("section", "", title=f"{what}, PyTorch {torch.__version__}")
    for heading in ("figure", "unit", "goal"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for each in figures:
        goal = "" if each.goal is None else f"{each.goal:g}"
        table.add_row(each.section, each.what, f"{each.value:,.4g}", each.unit, goal)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, reason in failures.items():
        console.print(f"{name}: {reason}", highlight=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _scale() -> Scale:
    return FULL if torch.cuda.is_available() else REHEARSAL


def _tests() -> list[Figure]:
    """Of a GPU all; of a rehearsal those that need none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", "not interpreter"]
    started = time.monotonic()
    subprocess.run([*command, *TESTS], check=True)
    return [Figure("tests", "kernels, backends, resume tolerance: passed in", time.monotonic() - started, "s")]


def _ranking() -> list[Figure]:
    device, scale, figures = _device(), _scale(), []
    backend = available_backends(device)[-1]
    for case in WHOLE:
        seconds = _seconds_of_whole(case, scale, device)
        figures.append(Figure("ranking", f"{case.name}, all pairs", seconds, "s", GOALS.get(case.name)))
    for name in GOALS:
        outcome = run_case(CASES[name], scale.part, [backend], "auto", device)
        ours = outcome.ours[backend]
        figures.append(Figure("ranking", f"{name}, published logic over ours", median(ours.ratios), "times"))
        figures.append(Figure("ranking", f"{name}, ranks unlike float64", ours.other_ranks, "mentions", 0))
        if device.type == "cuda":
            rates, wall = device_rates(device), median(cost.wall_s for cost in ours.measured.costs)
            tensor, exponentials = ours.work.operations / rates.operations, ours.work.exponentials / rates.exponentials
            figures.append(Figure("ranking", f"{name}, of the tensor rate", 100 * tensor / wall, "%"))
            figures.append(Figure("ranking", f"{name}, of the exp rate", 100 * exponentials / wall, "%"))
    return figures


def _seconds_of_whole(case: Case, scale: Scale, device: torch.device) -> float:
    """The middle of three rounds, after one that warms up."""
    ready = ready_to_rank(case, *scale.whole, available_backends(device)[-1], device)
    work = partial(rank_ours, ready.matcher, case, ready.mentions, ready.entities, ready.gold_row_M, device)
    return median([measured(work, device)[1].wall_s for _ in range(4)][1:])


def _step() -> list[Figure]:
    device, figures = _device(), []
    for rate in tower_rates(*_scale().tower, device, 3, compiled=device.type == "cuda"):
        name = f"{rate.case}, {'compiled' if rate.compiled else 'not compiled'}"
        figures += [
            Figure("step", name, rate.samples_per_s, "samples/s"),
            Figure("step", f"{name}, of the matrix rate", 100 * rate.share, "%"),
            Figure("step", f"{name}, peak memory", (rate.peak_bytes or 0) / 2**20, "MiB"),
        ]
    return figures


def _config() -> ExperimentConfig:
    """Demo's, over the towers and batches of this scale."""
    architecture, batch_size, precision = _scale().tower
    train = {"batch_size": batch_size, "micro_batch_size": None, "self_mentions": 0, "precision": precision}
    config = load_config("demo", ["backbone.pretrained=null", f"backbone.architecture={architecture}", "held_out=0"])
    return one_epoch(
        changed(
            config, {"train": train, "parts": {name: {"train": train} for name in config.parts}, "tune": {"rungs": [3]}}
        )
    )


def _on_drawn_data(measure: Callable[[ExperimentConfig, Dataset, Path], list[Figure]]) -> list[Figure]:
    with TemporaryDirectory(prefix="gpu-") as folder:
        data = prepared_release(_scale().entities, _scale().mentions, Path(folder))
        return measure(_config(), dsmip.open_dataset(data), Path(folder))


def _training(config: ExperimentConfig, dataset: Dataset, work: Path) -> list[Figure]:
    steps = bare(config, dataset, "multimodal", work)[0]
    return [
        Figure("training", "multimodal expert, pictures read and cut", steps.rate, "samples/s"),
        Figure("training", "of it waiting for data", 100 * steps.wait_s / steps.wall_s, "%"),
    ]


def _trial(config: ExperimentConfig, dataset: Dataset, work: Path) -> list[Figure]:
    found = trials(config, dataset, work)
    names = {"cached": "features cached", "once": "encoded once, first", "anew": "encoded batch by batch"}
    return [Figure("trial", f"stage two, {label}", getattr(found, name).wall_s, "s") for name, label in names.items()]


def _linking(config: ExperimentConfig, dataset: Dataset, work: Path) -> list[Figure]:
    run = untrained_run(work / "run", config, dataset)
    run.save_part(config.model, run.system.build_whole(config), {})
    linker = dsmip.load(str(run.folder), device=_device().type)
    mentions = list(dataset.mentions("test"))[: _scale().links]

    def link(some: Sequence[Mention]) -> float:
        return measured(lambda: list(linker.link_many(some)), _device())[1].wall_s

    link(mentions[:2])
    latencies, all_s = sorted(link([each]) for each in mentions), link(mentions)
    return [
        Figure("linking", "one mention, median", 1000 * median(latencies), "ms"),
        Figure("linking", "one mention, 99 of 100 within", 1000 * latencies[int(0.99 * len(latencies))], "ms"),
        Figure("linking", "many mentions", len(mentions) / all_s, "mentions/s"),
    ]


SECTIONS: Mapping[str, Callable[[], list[Figure]]] = {
    "tests": _tests,
    "ranking": _ranking,
    "step": _step,
    "training": partial(_on_drawn_data, _training),
    "trial": partial(_on_drawn_data, _trial),
    "linking": partial(_on_drawn_data, _linking),
}


if __name__ == "__main__":
    main()
