"""The command `python -m benchmarks.serving`: `POST /link` under load, against a bare loop over `link_many`.

Both in one go on one machine, by turns: the service in a process of its own, clients in another, the loop in a third.
Requests are test mentions of the run, with their pictures; with `--entities`, those of a generated bundle (its files
take tens of kilobytes an entity). On a machine of few cores clients cost as well.
"""

import argparse
import base64
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import httpx
import torch
from rich.table import Table

import dsmip
from benchmarks.data.big_bundle import ARCHITECTURE, write_big_bundle
from dsmip.data.records import Mention
from dsmip.runs.run import Run
from ray_jobs.terminal.lines import result_console

CLIENTS = (1, 8, 32)


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        location: A run or a bundle.
        mentions: What is asked for.
        data: Where a run's data lies, if it has moved.
        candidates: Entities that are scored for each mention; None: all.
    """

    location: str
    mentions: Sequence[Mention]
    data: str | None = None
    candidates: int | None = None


def main() -> None:
    """Parses the command line, measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a finished run, such as demo/run")
    what.add_argument("--entities", type=int, help="of a generated bundle, with the sizes of ViT-B/32")
    parser.add_argument("--data", help="where the run's data lies, if it has moved")
    parser.add_argument("--candidates", type=int, help="score only so many entities, found by global vectors")
    parser.add_argument("--system", default="dsmip", help="of the generated bundle")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of the generated bundle's backbone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        if given.entities:
            bundle, mentions = write_big_bundle(Path(folder), given.entities, given.system, given.architecture)
            model = Model(str(bundle), mentions, None, given.candidates)
        else:
            mentions = list(Run.open(given.run, given.data).dataset.mentions("test"))
            model = Model(given.run, mentions, given.data, given.candidates)
        rows = measure(model, given.clients, given.seconds)
    table = Table("clients", "mentions/s", "p50 ms", "p99 ms", "link_many, mentions/s", "share of it", "memory MiB")
    for row in rows:
        table.add_row(
            str(row["clients"]),
            *(f"{row[name]:.1f}" for name in ("per_second", "p50_ms", "p99_ms", "bare_per_second")),
            f"{row['share']:.2f}",
            f"{row['memory_mib']:.0f}",
        )
    result_console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=2))


def measure(model: Model, clients: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each number of clients; the bare loop is measured anew beside each."""
    bodies = [json.dumps(_as_json(each.word, each.sentence, each.image)).encode() for each in model.mentions]
    rows = []
    for count in clients:
        with _served(model) as (address, process):
            _load(address, bodies, 1, min(seconds, 2.0))  # what is slow once
            latencies, took = _load(address, bodies, count, seconds)
            memory = _resident(process.pid)
        bare = _in_a_process(model, seconds)
        ordered = sorted(latencies)
        rows.append(
            {
                "clients": count,
                "per_second": len(latencies) / took,
                "p50_ms": 1000 * ordered[len(ordered) // 2],
                "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
                "bare_per_second": bare,
                "share": len(latencies) / took / bare,
                "memory_mib": memory / 1024,
            }
        )
    return rows


def _as_json(word: str, sentence: str, image: bytes | None) -> dict[str, Any]:
    encoded = None if image is None else base64.b64encode(image).decode()
    return {"word": word, "sentence": sentence, "image": encoded, "top": 5}


@contextmanager
def _served(model: Model) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    options = [] if model.data is None else ["--data", model.data]
    options += [] if model.candidates is None else ["--candidates", str(model.candidates)]
    program = [sys.executable, "-c", "from ray_jobs.cli import main; main()"]
    command = [*program, "serve", model.location, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving on (http://\S+) ", line):
                yield found[1], process
                return
        raise SystemExit(f"the service of {model.location} did not start")
    finally:
        process.terminate()
        process.wait()


def _resident(pid: int) -> int:
    """KiB of memory that a process has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def _load(address: str, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer that a number of clients got, each with one request at a time, and how long they asked."""
    latencies: list[float] = []
    started = time.perf_counter()

    def ask(first: int) -> None:
        number, headers = first, {"content-type": "application/json"}
        with httpx.Client(base_url=address, timeout=600) as client:
            while time.perf_counter() - started < seconds:
                begun = time.perf_counter()
                answer = client.post("/link", content=bodies[number % len(bodies)], headers=headers)
                answer.raise_for_status()
                latencies.append(time.perf_counter() - begun)
                number += clients

    threads = [Thread(target=ask, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - started


def _in_a_process(model: Model, seconds: float) -> float:
    """Mentions a second of the bare loop, in a process without anything else."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_bare, (model, seconds))


def _bare(model: Model, seconds: float) -> float:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    linker, mentions = dsmip.load(model.location, data=model.data), model.mentions
    next(linker.link_many(mentions[:1], candidates=model.candidates))
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        batch = mentions[done % len(mentions) :][:32]
        done += sum(1 for _ in linker.link_many(batch, batch_size=32, candidates=model.candidates))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
