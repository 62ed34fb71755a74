"""The command `python -m benchmarks.ranking.candidates`: what candidates hold of the exact search, and what they cost.

Of each run: the share of mentions whose exact best entity, and whose gold, are among k candidates, by the model's
global vectors and by distilled ones (fitted here to training mentions, as `dsmip export` does); and milliseconds a
mention of the exact search and of that among candidates, by turns, without the encoding of mentions but with what must
be known of all entities before experts can be fused. With `--entities` the cost on a generated bundle, whose weights
are random: its recalls would say nothing.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table as ShownTable

import dsmip
from benchmarks.data.big_bundle import ARCHITECTURE, write_big_bundle
from dsmip.data.table import Table
from dsmip.distillation.fit import FitOptions
from dsmip.distillation.vectors import DistilledVectors, Projection, inputs_of
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors, VectorSource
from dsmip.exporting.agreement import Probes
from dsmip.exporting.candidate_vectors import distil
from dsmip.linking.linker import BATCH_SIZE
from dsmip.linking.search import ExactSearch
from dsmip.runs.run import Run
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import result_console

SCORED, TOP = 200, 5
"""Candidates whose cost is measured, and how many links are asked for."""
GLOBAL, DISTILLED = "global", "distilled"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints tables and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs")
    parser.add_argument("--model", help="a part, or the system's name (default)")
    parser.add_argument("--data", help="where the runs' data lies, if it has moved")
    parser.add_argument("--split", default="test", help="of the mentions (default: test)")
    parser.add_argument("--mentions", type=int, default=1000, help="how many of them at most")
    parser.add_argument("--timed", type=int, default=64, help="of how many the cost is measured")
    parser.add_argument("--entities", type=int, help="of a generated bundle, whose cost is measured")
    parser.add_argument("--system", default="dsmip", help="of the generated bundle")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of the generated bundle's backbone")
    parser.add_argument("--rounds", type=int, default=3, help="the cost is the middle of so many")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args(arguments)
    if not given.runs and given.entities is None:
        parser.error("give a RUN, or --entities")
    with Display() as display:
        recalls, costs = list[Row](), list[Row]()
        for run in given.runs:
            of_run = _of_run(run, given, display)
            recalls += of_run[0]
            costs += of_run[1]
        if given.entities is not None:
            costs += _of_generated(given, display)
    _show(recalls, costs)
    if given.json:
        given.json.write_text(json.dumps({"recalls": recalls, "costs": costs}, indent=2))


def _of_run(location: str, given: argparse.Namespace, display: Display) -> tuple[list[Row], list[Row]]:
    linker = dsmip.load(location, model=given.model, data=given.data)
    run = Run.open(location, given.data)
    probes = Probes.of(linker, list(islice(run.dataset.mentions(given.split), given.mentions)))
    started = time.perf_counter()
    learned = distil(linker, run.dataset, run.config.seed, display)
    seconds = {GLOBAL: 0.0, DISTILLED: time.perf_counter() - started}
    index, base = linker.search.index, GlobalVectors(linker.search.matcher, linker.device)
    searches = {GLOBAL: CandidateSearch(base, index), DISTILLED: CandidateSearch(learned, index)}
    about = {"run": location, "model": linker.model.name, "entities": len(linker)}
    recalls = [
        {**about, "mentions": len(probes.gold_row_M), "vectors": kind, "fitted_s": seconds[kind], **asdict(each)}
        for kind, search in searches.items()
        for each in probes.recalls(search)
    ]
    sources = {GLOBAL: base, DISTILLED: learned}
    costs = [about | row for row in _costs(linker, probes.tables[: max(given.timed // 64, 1)], sources, given.rounds)]
    return recalls, costs


def _of_generated(given: argparse.Namespace, display: Display) -> list[Row]:
    with TemporaryDirectory() as folder:
        asked = Path(folder), given.entities, given.system, given.architecture
        bundle, mentions = write_big_bundle(*asked, display)
        linker = dsmip.load(str(bundle))
        starts = range(0, min(given.timed, len(mentions)), BATCH_SIZE)
        tables = [linker.prepared(mentions[start : start + BATCH_SIZE]) for start in starts]
        base, options = GlobalVectors(linker.search.matcher, linker.device), FitOptions()
        some = next(iter(linker.search.index.tiles(1)))
        of_mentions = inputs_of(tables[0].rows(slice(0, 1)), "mentions", base).shape[1]
        of_entities = inputs_of(some, "entities", base).shape[1]
        torch.manual_seed(0)
        random = DistilledVectors(Projection(of_mentions, of_entities, options.hidden, options.width), base)
        about = {"run": "generated", "model": linker.model.name, "entities": len(linker)}
        sources = {GLOBAL: base, DISTILLED: random}
        return [about | row for row in _costs(linker, tables, sources, given.rounds)]


def _costs(
    linker: dsmip.Linker, tables: Sequence[Table], sources: Mapping[str, VectorSource], rounds: int
) -> list[Row]:
    """A row for each kind of vectors; `exact_ms` is the same in all."""
    searches = {
        kind: ExactSearch(linker.search.matcher, linker.search.index, linker.device, vectors=source)
        for kind, source in sources.items()
    }
    built = {kind: _seconds(partial(getattr, search, "candidates")) for kind, search in searches.items()}
    num_mentions = sum(map(len, tables))

    def among(search: ExactSearch) -> None:
        for table in tables:
            search.best_of(search.informed(table).mentions, TOP, SCORED)

    def exact() -> None:
        for table in tables:
            linker.search.best(linker.search.informed(table), TOP)

    ways: dict[str, Callable[[], None]] = {"exact": exact}
    ways |= {kind: partial(among, search) for kind, search in searches.items()}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            taken[way].append(1000 * _seconds(work) / num_mentions)
    exact_ms = median(taken["exact"])
    return [
        {
            "vectors": kind,
            "width": search.candidates.width,
            "built_s": built[kind],
            "exact_ms": exact_ms,
            "candidates_ms": median(taken[kind]),
            "ratio": exact_ms / median(taken[kind]),
        }
        for kind, search in searches.items()
    ]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _show(recalls: Sequence[Row], costs: Sequence[Row]) -> None:
    console = result_console()
    if recalls:
        table = ShownTable("run", "model", "entities", "mentions", "vectors", "k", "exact best", "gold", "fitted in s")
        for row in recalls:
            shown = [str(row[name]) for name in ("run", "model", "entities", "mentions", "vectors", "k")]
            table.add_row(*shown, f"{row['best']:.1%}", f"{row['gold']:.1%}", f"{row['fitted_s']:.1f}")
        console.print(table)
    table = ShownTable(
        "run", "model", "entities", "vectors", "width", "built in s", "exact, ms", f"{SCORED} candidates, ms", "ratio"
    )
    for row in costs:
        shown = [str(row[name]) for name in ("run", "model", "entities", "vectors", "width")]
        numbers = [f"{row[name]:.2f}" for name in ("built_s", "exact_ms", "candidates_ms", "ratio")]
        table.add_row(*shown, *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
