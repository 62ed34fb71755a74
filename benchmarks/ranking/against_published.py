"""Ranking against the published MIMIC evaluator's logic, by turns in one run.

    uv run python -m benchmarks.ranking [--case mimic-40] [--entities 8192] [--json FILE]

Cases: MIMIC's three units on texts of 40 and of 77 tokens; DSMIP's three experts and gate on padded texts of 77 tokens
(the published side computes every expert for every pair), and on texts of their own lengths (22 tokens on average) with
padding masked, which is another function than the padded one that it is compared with.

The published side ranks one batch of 20 mentions among `--published-entities`, ours `--mentions` among `--entities`;
what is compared is the cost of a pair: processor seconds on a CPU, seconds on the clock elsewhere. Preparing entities
is timed apart: once per knowledge base, where the published logic projects them again for every 20 mentions. Ranks are
compared with the float64 twin: the same matcher in double precision on the same prepared tables; scoring close pairs
again in double precision is part of what is timed. Run it alone: other
programs cost caches and waiting, even in processor seconds (with OMP_NUM_THREADS=1 least).
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranking.cases import CASES, MEAN_TOKENS
from benchmarks.ranking.contest import TOLERANCE, Ours, Outcome, Sizes, run_case
from benchmarks.ranking.published import ENTITY_CHUNK, MENTION_BATCH
from benchmarks.roofline import Rates, device_rates, matrix_rate
from dsmip.rank_options import PrecisionName
from dsmip.storage.atomic import write_json
from dsmip.units import text_unit_library
from dsmip.units.text_unit import Backend

BACKENDS: Mapping[str, Sequence[Backend]] = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}
PLAIN_WIDTH = 150


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases one after the other, prints a table and writes the rows."""
    options = _options(arguments)
    device = torch.device(options.device)
    sizes = Sizes(options.mentions, options.entities, min(options.published_entities, options.entities), options.rounds)
    backends, outcomes = options.backend or available_backends(device), []
    for name in options.case or CASES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        outcomes.append(run_case(CASES[name], sizes, backends, options.precision, device))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(_table(outcomes, device))
    for line in [*_notes(outcomes, sizes, device), *_shares(outcomes, device)]:
        console.print(line, highlight=False)
    if options.json is not None:
        rows = [_row(outcome, name) for outcome in outcomes for name in outcome.ours]
        write_json(options.json, {"rows": rows})


def available_backends(device: torch.device) -> list[Backend]:
    """The device's backends; a compiled one that cannot be had is named and left out."""
    backends = list(BACKENDS[device.type])
    if "cpp" in backends and (reason := text_unit_library.why_unavailable()) is not None:
        print(f"left out: backend cpp ({reason})", file=sys.stderr)
        backends.remove("cpp")
    return backends


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument(
        "--backend",
        action="append",
        choices=sorted({*chain(*BACKENDS.values())}),
        help="may be repeated (default: all that the device has)",
    )
    parser.add_argument("--precision", choices=get_args(PrecisionName), default="auto", help="as dsmip evaluate's")
    parser.add_argument("--mentions", type=_positive, default=20, help="default: 20")
    parser.add_argument("--entities", type=_positive, default=12288, help="default: 12288")
    parser.add_argument(
        "--published-entities",
        type=_positive,
        default=1000,
        help="a pair costs the published logic the same with 500 and with 3000; memory grows with it (default: 1000)",
    )
    parser.add_argument("--rounds", type=_positive, default=3, help="default: 3")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device {options.device} is unknown; known: cpu, cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _table(outcomes: Sequence[Outcome], device: torch.device) -> Table:
    table = Table(title="Full ranking: the published logic and ours")
    table.add_column("case")
    table.add_column("logic")
    unit = "CPU-us" if device.type == "cpu" else "us"
    for heading in (
        "pairs/s",
        f"{unit} a pair",
        "ratio (min..max)",
        "peak MiB",
        "index s",
        "bytes/entity",
        "ties",
        "ranks = fp64",
        "experts %",
    ):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        theirs = outcome.published
        common = (f"{theirs.pairs_per_s:,.0f}", f"{median(theirs.us_per_pair(device)):.2f}", "1", _mib(theirs.peak_mib))
        table.add_row(outcome.case.name, "published", *common, "", f"{outcome.published_bytes:,.0f}")
        for name, ours in outcome.ours.items():
            table.add_row("", name, *_cells(outcome, ours, device))
        table.add_section()
    return table


def _cells(outcome: Outcome, ours: Ours, device: torch.device) -> list[str]:
    ranking, num_mentions = ours.ranking, len(ours.ranking.rank_M)
    shares = ""
    if ranking.choices is not None:
        pairs_B = ranking.choices.pairs_MB.sum(dim=0).double()
        shares = " ".join(f"{100 * share:.0f}" for share in (pairs_B / pairs_B.sum()).tolist())
    return [
        f"{ours.measured.pairs_per_s:,.0f}",
        f"{median(ours.measured.us_per_pair(device)):.2f}",
        f"{median(ours.ratios):.1f} ({min(ours.ratios):.1f}..{max(ours.ratios):.1f})" + "*" * outcome.case.masked,
        _mib(ours.measured.peak_mib),
        f"{outcome.index_s:.1f}",
        f"{outcome.index_bytes:,.0f}",
        f"{int(ranking.counts.tied_M.sum())}",
        "all" if ours.other_ranks == 0 else f"{num_mentions - ours.other_ranks} of {num_mentions}",
        shares,
    ]


def _mib(peak_mib: float | None) -> str:
    return "?" if peak_mib is None else f"{peak_mib:,.0f}"


def _notes(outcomes: Sequence[Outcome], sizes: Sizes, device: torch.device) -> list[str]:
    where = f"CPU, threads: {torch.get_num_threads()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    differences = [ours.difference for o in outcomes for ours in o.ours.values() if ours.difference is not None]
    lines = [
        f"{where}, PyTorch {torch.__version__}, {sizes.rounds} rounds, one logic after the other",
        f"ours: {sizes.mentions} mentions x {sizes.entities} entities; published: "
        f"{min(MENTION_BATCH, sizes.mentions)} x {sizes.published_entities} (chunks of {ENTITY_CHUNK})",
        "peak: growth while ranking at these sizes, index and features not counted",
        "index: preparing all entities; ties: entities that score as their mention's gold",
    ]
    if differences:
        allowed = max(TOLERANCE[ours.precision] for o in outcomes for ours in o.ours.values())
        lines.append(
            f"largest score difference to the published logic: {max(differences):.1g} (allowed: {allowed:.1g})"
        )
    if any(outcome.case.masked for outcome in outcomes):
        lines.append(
            f"* another function: padding masked, {MEAN_TOKENS} tokens on average; the published side is padded"
        )
    choices = [ours.ranking.choices for o in outcomes for ours in o.ours.values()]
    if tied := [int(each.tied_M.sum()) for each in choices if each is not None and each.tied_M is not None]:
        experts = next(" ".join(o.case.choices) for o in outcomes if o.case.choices)
        lines.append(f"experts: {experts}; pairs whose choice was tied: {max(tied)}")
    return lines


def _shares(outcomes: Sequence[Outcome], device: torch.device) -> list[str]:
    """A line per backend: the share of the device's rates that the text units reached, in the whole ranking's time."""
    lines = []
    if device.type == "cpu":
        large = matrix_rate(device, torch.float32)
        for case, name, seconds, work in _work(outcomes, device):
            share = work.operations / seconds / large
            lines.append(f"{case}, {name}: {share:.1%} of the rate of a large dense product")
        return lines
    rates = device_rates(device)
    for case, name, seconds, work in _work(outcomes, device):
        tensor, exp = work.operations / seconds / rates.operations, work.exponentials / seconds / rates.exponentials
        lines.append(f"{case}, {name}: {tensor:.1%} of the tensor rate, {exp:.1%} of the exp rate")
    return lines


def _work(outcomes: Sequence[Outcome], device: torch.device) -> Iterator[tuple[str, str, float, Rates]]:
    """Case, backend, seconds (of processors on a CPU, else on the clock) and work of each."""
    for outcome in outcomes:
        for name, ours in outcome.ours.items():
            yield outcome.case.name, name, median(cost.seconds(device) for cost in ours.measured.costs), ours.work


def _row(outcome: Outcome, backend: str) -> dict[str, Any]:
    ours = outcome.ours[backend]
    return {
        "case": outcome.case.name,
        "backend": backend,
        "precision": ours.precision,
        "ratio": median(ours.ratios),
        "ratio_min": min(ours.ratios),
        "ratio_max": max(ours.ratios),
        "pairs_per_s": ours.measured.pairs_per_s,
        "ranks_equal": ours.other_ranks == 0,
        "peak_mib": ours.measured.peak_mib,
        "same_function": not outcome.case.masked,
    }
