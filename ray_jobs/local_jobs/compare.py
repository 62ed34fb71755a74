"""The job `dsmip compare`: two systems on the same mentions, with intervals and p-values. Knows no Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table

from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError
from dsmip.evaluation.metrics import LEVEL, NUM_FLIPS, NUM_RESAMPLES, adjusted
from dsmip.evaluation.stored.comparison import Comparison, Evaluation, compare, read_evaluation, unlike
from dsmip.storage.atomic import write_masked_json
from dsmip.storage.locations import Location
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import STAMP
from ray_jobs.terminal.lines import result_console

_SHOWN_VALUES = 50  # of a group: one that has more, such as a source for each mention, would bury the others


@dataclass(frozen=True)
class Side:
    """One of two systems: its runs, of one seed or several, and the model of each."""

    runs: tuple[Location, ...]
    model: str | None = None

    @classmethod
    def of(cls, text: str, model: str | None) -> Self:
        """Of runs as a command names them, with commas between."""
        return cls(tuple(each.strip() for each in text.split(",") if each.strip()), model)

    def read(self, split: str) -> list[Evaluation]:
        return [read_evaluation(run, split, self.model) for run in self.runs]


def compare_runs(
    side1: Side, side2: Side, *, split: str, seed: int, across: bool, json_file: Path | None
) -> Comparison:
    """Prints the comparison, and writes it to `json_file` when one is given.

    Raises:
        UserError: For an unknown split, a missing evaluation, one that is named twice, or some of different mentions,
            or, not `across`, of different protocols.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'; there are {', '.join(SPLITS)}")
    firsts, seconds = side1.read(split), side2.read(split)
    if not firsts or not seconds:
        raise UserError("RUN1 and RUN2 are a run each, or several with commas between: RUN-0,RUN-1,RUN-2")
    _check_different([*firsts, *seconds])
    found = compare(firsts, seconds, torch.Generator().manual_seed(seed), across=across)
    not_alike = unlike([*firsts, *seconds])
    if json_file is not None:
        runs = [{"run": str(each.run), "model": each.model, **_made(each)} for each in (*firsts, *seconds)]
        about = {"runs": runs, "runs_of_first": len(firsts), "split": split, "seed": seed, "across": not_alike}
        write_masked_json(json_file, {**about, **asdict(found)})
    _show(firsts, seconds, split, found, not_alike)
    return found


def _check_different(evaluations: Sequence[Evaluation]) -> None:
    seen = set()
    for each in evaluations:
        key = _identity(each)
        if key in seen:
            twice = f"both are {each}" if len(evaluations) == 2 else f"{each} is named twice"
            raise UserError(f"{twice}; give another RUN2, or --model1 and --model2")
        seen.add(key)


def _identity(evaluation: Evaluation) -> tuple[str, str]:
    """The run, wherever a copy of it lies, and the model."""
    stamp = read_json(evaluation.run.folder / STAMP, lambda stamp: stamp.get("id"))
    return str(stamp or evaluation.run.location), evaluation.model


def _made(evaluation: Evaluation) -> dict[str, Any]:
    """The data, seed and making of the run, as `run.json` has them."""
    return read_json(
        evaluation.run.folder / STAMP, lambda stamp: {name: stamp.get(name) for name in ("data", "seed", "made")}
    )


def _show(
    firsts: Sequence[Evaluation], seconds: Sequence[Evaluation], split: str, found: Comparison, not_alike: Sequence[str]
) -> None:
    console = result_console()
    console.print(f"{found.num_mentions} mentions of {split}")
    for number, side in enumerate((firsts, seconds), start=1):
        console.print(f"  {number}: {', '.join(map(str, side))}", soft_wrap=True)
    for line in _adjusted(firsts, seconds, found):
        console.print(line, soft_wrap=True)
    for difference in not_alike:
        console.print(f"  not evaluated alike: {difference}", soft_wrap=True)
    metrics = Table("", "1", "2", "2 - 1", f"{LEVEL:.0%} interval", "p")
    for name, metric in found.metrics.items():
        p_value = "" if metric.p_value is None else f"{metric.p_value:.4f}"
        figures = map(_figure, (metric.first, metric.second), metric.deviations)
        metrics.add_row(name, *figures, f"{metric.difference:+.3f}", _interval(metric.interval), p_value)
    console.print(metrics)
    console.print(
        f"paired over mentions: {NUM_RESAMPLES} bootstrap resamples, {NUM_FLIPS} random sign flips", soft_wrap=True
    )
    for line in _of_seeds(firsts, seconds):
        console.print(line, soft_wrap=True)
    for each in _of_groups(found):
        console.print(each, soft_wrap=isinstance(each, str))


def _of_groups(found: Comparison) -> Iterator[Table | str]:
    """hits@1 by group and value, and what is in the JSON alone."""
    hits = Table("hits@1 of", "mentions", "1", "2", "2 - 1", f"{LEVEL:.0%} interval")
    shown = {group: values for group, values in found.groups.items() if len(values) <= _SHOWN_VALUES}
    for group, values in shown.items():
        hits.add_section()
        for value, each in values.items():
            one, two = each["hits@1"]
            of_both = f"{two - one:+.3f}", _interval(each["interval"])
            hits.add_row(f"{group} {value or '-'}", str(each["mentions"]), f"{one:.3f}", f"{two:.3f}", *of_both)
    if shown:
        yield hits
    for group in sorted(found.groups.keys() - shown.keys()):
        yield f"{group}: {len(found.groups[group])} values, which --json has"


def _of_seeds(*sides: Sequence[Evaluation]) -> Iterator[str]:
    """What figures of several runs mean, in lines."""
    if all(len(side) == 1 for side in sides):
        return
    yield (
        "figures are means over a side's runs, with standard deviations; resamples draw runs, too, each side's on its "
        "own; p is of the mentions alone"
    )
    for number, side in enumerate(sides, start=1):
        seeds = [each.protocol.seed for each in side if each.protocol]
        if len(set(seeds)) < len(seeds):
            yield f"side {number} has several runs of one seed: their spread is not that of seeds"


def _adjusted(firsts: Sequence[Evaluation], seconds: Sequence[Evaluation], found: Comparison) -> Iterator[str]:
    """Each side's figures adjusted for chance, where knowledge bases of different sizes are compared."""
    sizes = [{each.protocol.entities for each in side if each.protocol} for side in (firsts, seconds)]
    if sizes[0] == sizes[1] or any(len(each) != 1 for each in sizes):
        return
    for number, (size,) in enumerate(sizes, start=1):
        of_side = {name: (each.first, each.second)[number - 1] for name, each in found.metrics.items()}
        figures = ", ".join(f"{name} {value:.3f}" for name, value in adjusted(of_side, size).items())
        yield f"  {number}, adjusted for chance among {size} entities: {figures}"


def _figure(value: float, deviation: float | None) -> str:
    return f"{value:.3f}" if deviation is None else f"{value:.3f} \u00b1 {deviation:.3f}"


def _interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:+.3f} to {high:+.3f}"
