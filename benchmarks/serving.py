"""The command `python -m benchmarks.serving`: `POST /link` under load, against a bare loop over `link_many`.

Both in one go on one machine, by turns: the service in a process of its own, clients in another, the loop in a third.
Requests are test mentions of the run, with their pictures; with `--entities`, those of a generated bundle (its files
take tens of kilobytes an entity). The loop is measured twice: in batches of 64, and of as many mentions as clients
wait, which is what the service can put together: the rest is what HTTP costs. Beside it stands how long encoding such a
batch takes alone. On a machine of few cores clients cost as well. `--change-every` changes the bundle's entities while
it is asked, as it is served.
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
from dsmip.runs.run import Run
from ray_jobs.terminal.lines import result_console

CLIENTS = (1, 8, 32)
_FULL_BATCH = 64
_BARE_SECONDS = 30.0  # at most: the loop's rate does not change


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
        rows = [
            row
            for candidates in given.candidates
            for row in measure(
                replace(model, candidates=candidates or None), given.clients, given.seconds, given.change_every
            )
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
        "share of that": "{share_same_batch:.2f}",
        "memory MiB": "{memory_mib:.0f}",
        "lost": "{lost}",
        "changes": "{changes}",
    }
    table = Table(*columns)
    for row in rows:
        table.add_row(*(form.format(**row) for form in columns.values()))
    result_console().print(table)


def measure(
    model: Model, clients: Sequence[int], seconds: float, change_every: float | None = None
) -> list[dict[str, Any]]:
    """A row for each number of clients; the bare loop is measured anew beside each.

    Args:
        change_every: Seconds between changes of the entities of the bundle that is served.
    """
    bodies = [json.dumps(_as_json(each.word, each.sentence, each.image)).encode() for each in model.mentions]
    rows = []
    for count in clients:
        with _served(model) as (address, process):
            _load(address, bodies, 1, min(seconds, 2.0))  # what is slow once
            with _changed(model.location, change_every) as changes:
                load = _load(address, bodies, count, seconds)
            memory = _resident(process.pid)
        (bare, _), (same, encoding_ms) = (
            _in_a_process(model, min(seconds, _BARE_SECONDS), size) for size in (_FULL_BATCH, min(count, _FULL_BATCH))
        )
        ordered, rate = sorted(load.latencies), len(load.latencies) / load.seconds
        if not ordered:
            raise SystemExit(f"none of {load.lost} requests was answered")
        rows.append(
            {
                "candidates": model.candidates or "all",
                "clients": count,
                "per_second": rate,
                "p50_ms": 1000 * ordered[len(ordered) // 2],
                "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
                "encoding_ms": encoding_ms,
                "bare_per_second": bare,
                "share": rate / bare,
                "bare_same_batch": same,
                "share_same_batch": rate / same,
                "memory_mib": memory / 1024,
                "lost": load.lost,
                "changes": changes.value,
            }
        )
    return rows


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


def _in_a_process(model: Model, seconds: float, batch_size: int) -> tuple[float, float]:
    """Mentions a second of the bare loop, and milliseconds that a batch takes to encode, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_bare, (model, seconds, batch_size))


def _bare(model: Model, seconds: float, batch_size: int) -> tuple[float, float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    linker, mentions = dsmip.load(model.location, data=model.data), model.mentions
    next(linker.link_many(mentions[:1], candidates=model.candidates))
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        batch = mentions[done % len(mentions) :][:batch_size]
        done += sum(1 for _ in linker.link_many(batch, batch_size=batch_size, candidates=model.candidates))
    rate, times, first = done / (time.perf_counter() - started), list[float](), 0
    while len(times) < 3 or sum(times) < seconds / 4:
        begun = time.perf_counter()
        linker.prepared(mentions[first % len(mentions) :][:batch_size])
        times.append(time.perf_counter() - begun)
        first += batch_size
    return rate, 1000 * median(times)


if __name__ == "__main__":
    main()
