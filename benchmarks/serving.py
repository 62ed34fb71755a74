"""The command `python -m benchmarks.serving`: `POST /link` under load, against a bare loop over `link_many`.

Both in one go on one machine, round by round: the service in a process of its own, clients in another, the loop in a
third; shares are of the same round, and their middle, least and most are shown.
Requests are test mentions of the run, with their pictures; with `--entities`, those of a generated bundle (its files
take tens of kilobytes an entity). The loop links in batches of as many mentions as clients wait, which is what the
service can put together: the rest is what HTTP costs. Once, beside them, stand the loop in batches of 64, and how long
encoding a batch takes alone. On a machine of few cores clients cost as well. `--change-every` changes the bundle's
entities while it is asked, as it is served.
"""

import argparse
import base64
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from rich.table import Table

import dsmip
from benchmarks.data.big_bundle import ARCHITECTURE, write_big_bundle
from dsmip.data.records import Mention
from dsmip.linking.linker import Linker
from dsmip.runs.run import Run
from ray_jobs.terminal.lines import result_console

CLIENTS = (1, 8, 32)
_FULL_BATCH = 64


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


@dataclass(frozen=True)
class Timing:
    """How it is measured.

    Attributes:
        seconds: Of each measurement.
        rounds: Of the service and the loop, by turns.
        change_every: Seconds between changes of the entities of the bundle that is served.
    """

    seconds: float
    rounds: int
    change_every: float | None = None


@dataclass(frozen=True)
class Load:
    """What clients got: seconds of each answer, how many requests had none or an error, and how long they asked."""

    latencies: Sequence[float]
    lost: int
    seconds: float


def main() -> None:
    """Parses the command line, measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a finished run, such as demo/run")
    what.add_argument("--entities", type=int, help="of a generated bundle, with the sizes of ViT-B/32")
    parser.add_argument("--data", help="where the run's data lies, if it has moved")
    parser.add_argument("--bundle", help="of the run: it is served instead")
    parser.add_argument(
        "--change-every", type=float, help="add or remove an entity so many seconds after the last time"
    )
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[0], help="entities that are scored, one after the other; 0: all"
    )
    parser.add_argument("--system", default="dsmip", help="of the generated bundle")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of the generated bundle's backbone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        if given.entities:
            bundle, mentions = write_big_bundle(Path(folder), given.entities, given.system, given.architecture)
            model = Model(str(bundle), mentions)
        else:
            mentions = list(Run.open(given.run, given.data).dataset.mentions("test"))
            data = None if given.bundle else given.data
            location = given.bundle or given.run
            if given.bundle and given.change_every:  # the user's own stays as it is
                location = str(shutil.copytree(given.bundle, Path(folder) / "bundle"))
            model = Model(location, mentions, data)
        timing = Timing(given.seconds, given.rounds, given.change_every)
        rows = [
            row
            for candidates in given.candidates
            for row in measure(replace(model, candidates=candidates or None), given.clients, timing)
        ]
    _print(rows)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=2))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    columns = {
        "candidates": "{candidates}",
        "clients": "{clients}",
        "mentions/s": "{per_second:.1f}",
        "p50, p99 ms": "{p50_ms:.0f}, {p99_ms:.0f}",
        "encoding ms": "{encoding_ms:.0f}",
        "link_many": "{bare_per_second:.1f}",
        "share": "{share:.2f}",
        "in batches of clients": "{bare_same_batch:.1f}",
        "share of that": "{share_same_batch:.2f} ({share_least:.2f} to {share_most:.2f})",
        "memory MiB": "{memory_mib:.0f}",
        "lost": "{lost}",
        "changes": "{changes}",
    }
    table = Table(*columns)
    for row in rows:
        table.add_row(*(form.format(**row) for form in columns.values()))
    result_console().print(table)


def measure(model: Model, clients: Sequence[int], timing: Timing) -> list[dict[str, Any]]:
    """A row for each number of clients; service and bare loop by turns, each in one process all the while."""
    bodies = [json.dumps(_as_json(each.word, each.sentence, each.image)).encode() for each in model.mentions]
    rows = []
    with _served(model) as (address, process), multiprocessing.get_context("spawn").Pool(1) as bare:
        _load(address, bodies, 1, min(timing.seconds, 2.0))  # what is slow once
        bare.apply(_rate, (model, 1, 0.0))
        for count in clients:
            size, loads, rates, num_changes = min(count, _FULL_BATCH), list[Load](), list[float](), 0
            for _ in range(timing.rounds):
                with _changed(model.location, timing.change_every) as changes:
                    loads.append(_load(address, bodies, count, timing.seconds))
                num_changes += changes.value
                rates.append(bare.apply(_rate, (model, size, timing.seconds)))
            row = _row(count, loads, rates, bare.apply(_rate, (model, _FULL_BATCH, timing.seconds)))
            encoding_ms = bare.apply(_encoding_ms, (model, size, timing.seconds / 4))
            about = {"candidates": model.candidates or "all", "encoding_ms": encoding_ms, "changes": num_changes}
            rows.append(about | row | {"memory_mib": _resident(process.pid) / 1024})
    return rows


def _row(clients: int, loads: Sequence[Load], same_batch: Sequence[float], full_batch: float) -> dict[str, Any]:
    """Middle of the rounds; latencies are those of all."""
    latencies = sorted(seconds for load in loads for seconds in load.latencies)
    if not all(load.latencies for load in loads):
        raise SystemExit(f"none of {max(load.lost for load in loads)} requests was answered")
    rates = [len(load.latencies) / load.seconds for load in loads]
    shares = sorted(rate / bare for rate, bare in zip(rates, same_batch, strict=True))
    return {
        "clients": clients,
        "per_second": median(rates),
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[int(len(latencies) * 0.99)],
        "bare_per_second": full_batch,
        "share": median(rates) / full_batch,
        "bare_same_batch": median(same_batch),
        "share_same_batch": median(shares),
        "share_least": shares[0],
        "share_most": shares[-1],
        "lost": sum(load.lost for load in loads),
    }


@contextmanager
def _changed(location: str, every: float | None) -> Iterator["Synchronized[int]"]:
    """How often a process has changed the bundle's entities."""
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("i", 0), context.Event()
    if every is None:
        yield count
        return
    process = context.Process(target=_change, args=(location, every, count, stop))
    process.start()
    try:
        yield count
    finally:
        stop.set()
        process.join()
        if process.exitcode:
            raise SystemExit("entities could not be changed: see above")


def _change(location: str, every: float, count: "Synchronized[int]", stop: Event) -> None:
    """Adds an entity and removes it, by turns."""
    entities, entity = dsmip.load(location).entities, {"entity_id": "benchmark", "name": "Changing entity"}
    there = False
    while not stop.wait(every):
        if there:
            entities.remove([entity["entity_id"]])
        else:
            entities.add([entity])
        there = not there
        count.value += 1
    if there:
        entities.remove([entity["entity_id"]])


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


def _load(address: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    """A number of clients, each with one request at a time."""
    latencies, lost = list[float](), list[str]()
    started = time.perf_counter()

    def ask(first: int) -> None:
        number, headers = first, {"content-type": "application/json"}
        client = HTTPConnection(address.removeprefix("http://"), timeout=600)  # the lightest: clients share the cores
        while time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            try:
                client.request("POST", "/link", bodies[number % len(bodies)], headers)
                answer = client.getresponse()
                answer.read()
                if answer.status == HTTPStatus.OK:
                    latencies.append(time.perf_counter() - begun)
                else:
                    lost.append(f"{answer.status} {answer.reason}")
            except (HTTPException, OSError) as error:
                lost.append(str(error))
                client.close()
            number += clients
        client.close()

    threads = [Thread(target=ask, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in set(lost):
        print(f"lost: {error}", file=sys.stderr)
    return Load(latencies, len(lost), time.perf_counter() - started)


@cache
def _bare_linker(location: str, data: str | None) -> Linker:
    """In the process of the bare loop."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return dsmip.load(location, data=data)


def _rate(model: Model, batch_size: int, seconds: float) -> float:
    """Mentions a second of the bare loop, of at least one batch."""
    linker, mentions, done = _bare_linker(model.location, model.data), model.mentions, 0
    started = time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        batch = mentions[done % len(mentions) :][:batch_size]
        done += sum(1 for _ in linker.link_many(batch, batch_size=batch_size, candidates=model.candidates))
    return done / (time.perf_counter() - started)


def _encoding_ms(model: Model, batch_size: int, seconds: float) -> float:
    """Milliseconds that a batch takes to encode, middle of at least three."""
    linker, times = _bare_linker(model.location, model.data), list[float]()
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        linker.prepared(model.mentions[len(times) * batch_size % len(model.mentions) :][:batch_size])
        times.append(time.perf_counter() - begun)
    return 1000 * median(times)


if __name__ == "__main__":
    main()
