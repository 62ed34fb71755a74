"""The training stream out of an object store against the same stream out of a folder: samples a second.

    uv run python -m benchmarks.stores [--data DIR] [--uri s3://bucket/prefix] [--rounds 3] [--json FILE]

By turns, in each round: the folder; the store with an empty cache (every shard is fetched); the store again (every
shard is a copy on this node). "records" makes batches of encoded bytes, "all" decodes pictures and tokenizes too,
ahead in a thread as a training does. Without `--uri` the store is moto's S3 server in a process of this machine: it
shares the processors with the stream, and its network is the machine's own; a real store has latency instead. With
`--uri` the dataset is uploaded there first, and stays.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data.big_release import BigRelease, positive, write_big_release
from benchmarks.data.shards import Work, streaming
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.publish import upload_dataset
from data_prep.build.runners import run_in_processes
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.errors import ReportedError
from dsmip.storage.atomic import write_json
from tests.support.object_store import free_port, running_store, variables

WORKS: dict[Work, int] = {"records": 0, "all": 4}  # batches read ahead
WAYS = ("folder", "cold", "warm")
_ALL = 1 << 40


@dataclass(frozen=True)
class Copies:
    """The same dataset in a folder and in a store, and the cache of this run."""

    folder: Path
    uri: str
    cache: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the rows."""
    options = _options(arguments)
    with (
        TemporaryDirectory(dir=options.work, prefix="stores-") as temporary,
        _store(options.uri, Path(temporary)) as uri,
    ):
        work = Path(temporary)
        try:
            folder = options.data or _made(options, work)
            print("uploading ...", file=sys.stderr, flush=True)
            upload_dataset(folder, uri, work / "uploaded.json")
            os.environ["DSMIP_CACHE"] = str(work / "cache")
            rows = measure(Copies(folder, uri, work / "cache"), options.batch_size, options.rounds)
        except ReportedError as error:
            sys.exit(str(error))
    _show(rows, options)
    if options.json is not None:
        write_json(options.json, {"rows": rows})


def measure(copies: Copies, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of work: middles of samples a second, and of the ratios to the folder in the same round."""
    rates: dict[tuple[Work, str], list[float]] = {(work, way): [] for work in WORKS for way in WAYS}
    for location in (str(copies.folder), copies.uri):
        streaming(location, batch_size, batch_size, 0, 1, "all", 0)()  # what is done once in a process
    for number in range(rounds):
        print(f"round {number + 1} ...", file=sys.stderr, flush=True)
        for work in WORKS:
            shutil.rmtree(copies.cache, ignore_errors=True)
            for way in WAYS:
                rates[work, way].append(_rate(str(copies.folder) if way == "folder" else copies.uri, batch_size, work))
    mebibytes = sum(shard.bytes for shard in Dataset.open(copies.folder).manifest.shards_of("train")) / 2**20
    return [_row(work, rates, mebibytes) for work in WORKS]


def _rate(location: str, batch_size: int, work: Work) -> float:
    """Samples a second of a whole epoch, opening the dataset included."""
    started = time.perf_counter()
    count = streaming(location, batch_size, _ALL, 0, 1, work, WORKS[work])()
    return count / (time.perf_counter() - started)


def _row(work: Work, rates: dict[tuple[Work, str], list[float]], mebibytes: float) -> dict[str, Any]:
    by_round = {way: rates[work, way] for way in WAYS}
    ratios = {
        f"{way}_ratio": median(a / b for a, b in zip(by_round[way], by_round["folder"], strict=True))
        for way in WAYS[1:]
    }
    return {"work": work, "MiB": mebibytes, **{way: median(found) for way, found in by_round.items()}, **ratios}


@contextmanager
def _store(uri: str | None, work: Path) -> Iterator[str]:
    """The given URI, or a server of this benchmark."""
    if uri is not None:
        yield uri
        return
    port = free_port()
    os.environ.update(variables(port, work))
    with running_store(port) as store:
        yield f"{store.uri}/data"


def _made(options: argparse.Namespace, work: Path) -> Path:
    print("writing and preparing a release ...", file=sys.stderr, flush=True)
    write_big_release(BigRelease(options.entities, options.mentions), work / "release", 2)
    with run_in_processes(2) as run:
        prepare(MimicRelease(work / "release"), work / "data", DatasetOptions(name="big"), run=run)
    return work / "data"


def _show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title="Samples a second of the training stream")
    for heading in ("work", *WAYS, "cold : folder", "warm : folder"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates = [f"{row[way]:,.0f}" for way in WAYS]
        table.add_row(row["work"], *rates, f"{row['cold_ratio']:.2f}", f"{row['warm_ratio']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{rows[0]['MiB']:,.0f} MiB of training shards, batches of {options.batch_size}, {options.rounds} rounds by "
        "turns, middles; one process",
        highlight=False,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.stores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a prepared dataset (default: makes one)")
    parser.add_argument("--uri", help="where to put it, in a store of your own (default: a server on this machine)")
    parser.add_argument("--entities", type=positive, default=4000, help="of the dataset made (default: 4000)")
    parser.add_argument("--mentions", type=positive, default=8000, help="of the dataset made (default: 8000)")
    parser.add_argument("--batch-size", type=positive, default=128, help="default: 128")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args(arguments)
