"""Costs of training: stage one bare and in Ray Train, on one and two workers; the first step; the feature cache.

    uv run python -m benchmarks.stage_one [--config demo] [--data DIR] [--rounds 3] [--json FILE]

Data are drawn and prepared on the spot unless `--data` is given. The configuration is a shipped one or a file, with one
epoch and random backbone weights. Every worker has one thread and, where there are GPUs, one of them. Each round goes
through everything but the towers, so that a machine that is busy for a while disturbs all alike; ratios are of the same
round. CPU time is what other programs disturb least. The last table is of the towers alone: on a GPU ViT-B/32, batches
of 128, bf16; else the configuration's backbone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data.big_release import positive, prepared_release
from benchmarks.training import first_step
from benchmarks.training.stage_two_trial import Trials, trials
from benchmarks.training.steps import WARM_UP, Steps, bare, in_ray_train, one_epoch
from benchmarks.training.tower_rate import TowerRate, tower_rates
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.load_config import changed, load_config, to_yaml
from dsmip.storage.atomic import write_json, write_text

WORKERS = (1, 2)
MIB = 2**20
_TRAIN_SHARE = 0.7  # of a drawn release's mentions
_GPU_CASE = ("ViT-B-32", 128, "bf16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table for each question and writes the figures."""
    options = _options(arguments)
    with TemporaryDirectory(dir=options.work, prefix="stage-one-") as work:
        try:
            config = _config(options)
            dataset = Dataset.open(options.data or _made(options, Path(work)))
            found = measure(config, dataset, options, Path(work))
        except UserError as error:
            sys.exit(str(error))
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in _tables(found, options):
        console.print(table)
    if options.json is not None:
        write_json(options.json, found)


def measure(config: ExperimentConfig, dataset: Dataset, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All figures, as plain values."""
    parts = find_system(config.model).part_names(config.system)
    part = options.part or parts[-1]
    if part not in parts:
        raise UserError(f"--part {part}: {config.model} has {', '.join(parts)}")
    counts = [count for count in WORKERS if count <= _max_workers()]
    bare_steps: dict[str, list[Steps]] = {name: [] for name in parts}
    in_ray: dict[int, list[Steps]] = {count: [] for count in counts}
    apart: list[float] = []
    command, stage_two = [], []
    write_text(work / "config.yaml", to_yaml(config))
    for number in range(options.rounds):
        for name in parts:
            _say(f"round {number + 1}: {name}, bare")
            bare_steps[name] += bare(config, dataset, name, work)
        _say(f"round {number + 1}: {part}, Ray Train with {' and '.join(map(str, counts))} workers")
        for count, steps in zip(counts, in_ray_train(config, dataset, part, work, counts), strict=True):
            in_ray[count].append(steps)
        if len(counts) > 1 and options.device.type == "cpu":  # on GPUs they would share one
            _say(f"round {number + 1}: {part}, {counts[-1]} bare loops side by side")
            both = bare(config, dataset, part, work, counts[-1])
            apart.append(sum(steps.rate for steps in both) / bare_steps[part][-1].rate)
        _say(f"round {number + 1}: from the command to the first step")
        command.append(first_step.seconds(work / "config.yaml", dataset.folder, work / f"run-{number}"))
        if find_system(config.model).gated:
            _say(f"round {number + 1}: trials of stage two with and without cached features")
            stage_two.append(trials(config, dataset, work))
    _say("towers")
    towers = tower_rates(*_tower_case(config), options.device, options.rounds, compiled=options.compile)
    return {
        "experts": {name: _speed(of_part) for name, of_part in bare_steps.items()},
        "ray_train": {"part": part, **_overhead(bare_steps[part], in_ray[1])},
        "workers": {str(count): _scaling(in_ray[1], of_count) for count, of_count in in_ray.items()},
        "apart": median(apart) if apart else None,
        "first_step": {stage: median(one[stage] for one in command) for stage in first_step.STAGES},
        "stage_two": _cache(stage_two),
        "towers": [asdict(one) for one in towers],
    }


def _speed(rounds: Sequence[Steps]) -> dict[str, float]:
    return {
        "samples_per_s": median(steps.rate for steps in rounds),
        "step_s": median(steps.step_s for steps in rounds),
        "step_cpu_s": median(steps.step_cpu_s for steps in rounds),
        "data_wait_share": median(steps.wait_s / steps.wall_s for steps in rounds),
        "steps": rounds[0].count,
    }


def _overhead(alone: Sequence[Steps], in_ray: Sequence[Steps]) -> dict[str, float]:
    pairs = list(zip(in_ray, alone, strict=True))
    return {
        "bare_step_s": median(steps.step_s for steps in alone),
        "ray_step_s": median(steps.step_s for steps in in_ray),
        "bare_step_cpu_s": median(steps.step_cpu_s for steps in alone),
        "ray_step_cpu_s": median(steps.step_cpu_s for steps in in_ray),
        "wall_overhead": median(ray.step_s / one.step_s for ray, one in pairs) - 1,
        "cpu_overhead": median(ray.step_cpu_s / one.step_cpu_s for ray, one in pairs) - 1,
        "bare_report_s": median(steps.report_s for steps in alone),
        "ray_report_s": median(steps.report_s for steps in in_ray),
    }


def _scaling(one: Sequence[Steps], more: Sequence[Steps]) -> dict[str, float]:
    pairs = list(zip(one, more, strict=True))
    return {
        "samples_per_s": median(steps.rate for steps in more),
        "step_s": median(steps.step_s for steps in more),
        "step_cpu_s": median(steps.step_cpu_s for steps in more),
        "times_one": median(two.rate / alone.rate for alone, two in pairs),
        "cpu_times_one": median(two.step_cpu_s / alone.step_cpu_s for alone, two in pairs),
    }


def _cache(rounds: Sequence[Trials]) -> dict[str, float]:
    """Seconds, and ratios to the trial with a cache, in time on the clock and in processor time."""
    if not rounds:
        return {}
    figures: dict[str, float] = {"epochs": rounds[0].cached.epochs}
    for name in ("cached", "once", "anew"):
        pairs = [(getattr(one, name), one.cached) for one in rounds]
        figures[f"{name}_s"] = median(trial.wall_s for trial, _ in pairs)
        figures[f"{name}_ratio"] = median(trial.wall_s / cached.wall_s for trial, cached in pairs)
        figures[f"{name}_cpu_ratio"] = median(trial.cpu_s / cached.cpu_s for trial, cached in pairs)
    return figures


def _tables(found: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    speed = Table(title=f"Stage one, bare loop: batches of {options.batch_size}, one thread, {options.rounds} rounds")
    for heading in ("part", "samples/s", "s a step", "CPU s a step", "waiting for data", "steps counted"):
        speed.add_column(heading, justify="left" if heading == "part" else "right")
    for name, of_part in found["experts"].items():
        speed.add_row(name, f"{of_part['samples_per_s']:.1f}", *_seconds(of_part), *_wait(of_part))
    return [speed, _ray_table(found["ray_train"]), _workers_table(found), *_other_tables(found)]


def _seconds(figures: dict[str, float]) -> tuple[str, str]:
    return f"{figures['step_s']:.3f}", f"{figures['step_cpu_s']:.3f}"


def _wait(figures: dict[str, float]) -> tuple[str, str]:
    return f"{figures['data_wait_share']:.1%}", f"{figures['steps']:.0f}"


def _ray_table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"Ray Train against the bare loop: {figures['part']}, one worker")
    for heading in ("", "bare", "Ray Train", "more (same round)"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, name in (("s a step", "step"), ("CPU s a step", "step_cpu")):
        more = figures["wall_overhead" if name == "step" else "cpu_overhead"]
        table.add_row(label, f"{figures[f'bare_{name}_s']:.3f}", f"{figures[f'ray_{name}_s']:.3f}", f"{more:+.1%}")
    table.add_row("end of an epoch, s", f"{figures['bare_report_s']:.3f}", f"{figures['ray_report_s']:.3f}", "")
    return table


def _workers_table(found: dict[str, Any]) -> Table:
    table = Table(title=f"Workers of Ray Train, the same batches: {found['ray_train']['part']}")
    for heading in ("workers", "samples/s", "s a step", "CPU s a step", "times one worker", "its CPU time"):
        table.add_column(heading, justify="right")
    for count, of in found["workers"].items():
        ratios = (f"{of['times_one']:.2f}", f"{of['cpu_times_one']:.2f}")
        table.add_row(count, f"{of['samples_per_s']:.1f}", *_seconds(of), *ratios)
    if found["apart"] is not None:
        count = max(found["workers"], key=int)
        table.caption = f"{count} bare loops side by side, which share nothing: {found['apart']:.2f} times one"
    return table


def _other_tables(found: dict[str, Any]) -> list[Table]:
    command = Table("", "s", title="From `dsmip train` to the first step of its first part")
    for stage, seconds in found["first_step"].items():
        command.add_row(stage, f"{seconds:.2f}")
    command.add_row("all", f"{sum(found['first_step'].values()):.2f}")
    tables = [command]
    if trial := found["stage_two"]:
        cache = Table(title=f"A trial of stage two, {trial['epochs']} epochs, one thread")
        for heading in ("features", "s", "times as long", "in CPU time"):
            cache.add_column(heading, justify="right" if heading != "features" else "left")
        labels = {"cached": "from the cache", "once": "encoded once, first", "anew": "encoded batch by batch"}
        for name, label in labels.items():
            ratios = (f"{trial[f'{name}_{kind}']:.2f}" for kind in ("ratio", "cpu_ratio"))
            cache.add_row(label, f"{trial[f'{name}_s']:.2f}", *ratios)
        tables.append(cache)
    return [*tables, _tower_table([TowerRate(**one) for one in found["towers"]])]


def _tower_table(rates: Sequence[TowerRate]) -> Table:
    table = Table(title="Steps of the multimodal expert on drawn batches")
    headings = (
        "towers",
        "compiled",
        "ms a step",
        "samples/s",
        "GFLOP a step",
        "of the matrix rate",
        "kept MiB",
        "peak MiB",
    )
    for heading in (*headings, "first step, s"):
        table.add_column(heading, justify="left" if heading == "towers" else "right")
    for one in rates:
        table.add_row(
            one.case,
            "yes" if one.compiled else "no",
            f"{1e3 * one.step_s:.1f}",
            f"{one.samples_per_s:.1f}",
            f"{one.operations / 1e9:,.1f}",
            f"{one.share:.1%}",
            f"{one.kept_bytes / MIB:,.0f}",
            "?" if one.peak_bytes is None else f"{one.peak_bytes / MIB:,.0f}",
            f"{one.first_s:.1f}",
        )
    return table


def _tower_case(config: ExperimentConfig) -> tuple[str, int, str]:
    """Architecture, batch size and precision; a CPU without matrix units is slow in bf16."""
    if torch.cuda.is_available():
        return _GPU_CASE
    return config.backbone.architecture, config.train.batch_size, "fp32"


def _max_workers() -> int:
    """Workers that this machine has room for."""
    return torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1


def _config(options: argparse.Namespace) -> ExperimentConfig:
    """One epoch of plain batches: no micro-batches, whose towers run twice, and no items beside the mentions."""
    config = load_config(options.config, ["backbone.pretrained=null", "held_out=0"])
    train = {"batch_size": options.batch_size, "micro_batch_size": None, "self_mentions": 0}
    names = find_system(config.model).part_names(config.system)
    return one_epoch(changed(config, {"train": train, "parts": {name: {"train": train} for name in names}}))


def _made(options: argparse.Namespace, work: Path) -> Path:
    """A dataset whose training split has the steps asked for."""
    _say("writing and preparing a release ...")
    mentions = int((options.steps + WARM_UP) * options.batch_size / _TRAIN_SHARE)
    return prepared_release(options.entities, mentions, work)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.stage_one", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="demo", help="a shipped name or a YAML file (default: demo)")
    parser.add_argument("--part", help="of the comparison with Ray Train (default: the last one)")
    parser.add_argument("--data", type=Path, help="a prepared dataset (default: makes one)")
    parser.add_argument("--entities", type=positive, default=300, help="of the dataset made (default: 300)")
    parser.add_argument("--steps", type=positive, default=20, help="of the dataset made (default: 20)")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: 32, steps of about 0.5 s on a CPU")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no towers with compiled layers")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    return options
