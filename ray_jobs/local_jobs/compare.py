"""The job `dsmip compare`: two evaluations on the same mentions, with intervals and p-values. Knows no Ray."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError
from dsmip.evaluation.comparison import Comparison, Evaluation, compare, read_evaluation
from dsmip.evaluation.metrics import LEVEL, NUM_FLIPS, NUM_RESAMPLES
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import Location
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import STAMP
from ray_jobs.terminal.lines import result_console


def compare_runs(
    run1: Location,
    run2: Location,
    *,
    split: str,
    model1: str | None,
    model2: str | None,
    seed: int,
    json_file: Path | None,
) -> Comparison:
    """Prints the comparison, and writes it to `json_file` when one is given.

    Raises:
        UserError: For an unknown split, a missing evaluation, two that are one, or two of different tasks.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'; there are {', '.join(SPLITS)}")
    first, second = read_evaluation(run1, split, model1), read_evaluation(run2, split, model2)
    if (first.run.location, first.model) == (second.run.location, second.model):
        raise UserError(f"both are {first}; give another RUN2, or --model1 and --model2")
    found = compare(first, second, torch.Generator().manual_seed(seed))
    if json_file is not None:
        sides = [{"run": str(each.run), "model": each.model, **_made(each)} for each in (first, second)]
        write_masked_json(json_file, {"runs": sides, "split": split, "seed": seed, **asdict(found)})
    _show(first, second, split, found)
    return found


def _made(evaluation: Evaluation) -> dict[str, Any]:
    """The data, seed and making of the run, as `run.json` has them."""
    return read_json(
        evaluation.run.folder / STAMP, lambda stamp: {name: stamp.get(name) for name in ("data", "seed", "made")}
    )


def _show(first: Evaluation, second: Evaluation, split: str, found: Comparison) -> None:
    console = result_console()
    console.print(f"{found.num_mentions} mentions of {split}\n  1: {first}\n  2: {second}", soft_wrap=True)
    metrics = Table("", "1", "2", "2 - 1", f"{LEVEL:.0%} interval", "p")
    for name, metric in found.metrics.items():
        low, high = metric.interval
        interval = f"{low:+.3f} to {high:+.3f}"
        p_value = "" if metric.p_value is None else f"{metric.p_value:.4f}"
        figures = (f"{metric.first:.3f}", f"{metric.second:.3f}", f"{metric.difference:+.3f}")
        metrics.add_row(name, *figures, interval, p_value)
    console.print(metrics)
    console.print(
        f"paired over mentions: {NUM_RESAMPLES} bootstrap resamples, {NUM_FLIPS} random sign flips", soft_wrap=True
    )
    hits = Table("hits@1 of", "mentions", "1", "2", "2 - 1")
    for group, values in found.groups.items():
        hits.add_section()
        for value, each in values.items():
            one, two = each["hits@1"]
            hits.add_row(
                f"{group} {value or '-'}", str(each["mentions"]), f"{one:.3f}", f"{two:.3f}", f"{two - one:+.3f}"
            )
    if found.groups:
        console.print(hits)
