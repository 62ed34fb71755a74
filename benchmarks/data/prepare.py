"""`prepare` against the bare work on the same pictures: reading, decoding, resizing and encoding in a loop.

    uv run python -m benchmarks.prepare [--release FOLDER] [--entities 8000 --mentions 2000] [--json FILE]

Both run with 1 and with 2 workers, by turns; the bare loop in as many processes of one thread, so that what cores share
(caches, clock) costs both alike. "whole" is the call of `prepare`: starting processes, hashing and reading the release,
making and hashing shards. "shards" is its steady part, while pictures are made. Without `--release` a release is made
first (`benchmarks.data.big_release`). Run it alone: other programs take cores.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from benchmarks.data.big_release import BigRelease, positive, write_big_release
from benchmarks.data.processes import Pace, Processes
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.runners import run_in_processes
from data_prep.formats.mimic import MimicRelease
from dsmip.data.image_preparation import JPEG_QUALITY
from dsmip.planning.probing.measure import status_bytes
from dsmip.storage.atomic import write_json

WORKERS = (1, 2)
SIZE = 224
_IMAGE_STAGES = ("entities", "mentions")
_FOLDERS = ("kb_image", "mention_image", "mention_images")


@dataclass(frozen=True)
class Prepared:
    """One build. images: named by its records. stages: seconds by name, its processes' start included.

    made_rate: pictures a second while shards are made. cpu_s, worker_peak: of the workers, the latter of the largest
    (Linux counts what a process was forked from, so it is never less than the driver at that time).
    """

    images: int
    wall_s: float
    cpu_s: float
    made_rate: float
    stages: dict[str, float]
    driver_peak: int
    worker_peak: int

    @property
    def rate(self) -> float:
        """Pictures a second of the whole build."""
        return self.images / self.wall_s


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the rows."""
    options = _options(arguments)
    with TemporaryDirectory(dir=options.work, prefix="prepare-") as work:
        release = options.release
        if release is None:
            print("writing a release ...", file=sys.stderr, flush=True)
            release = Path(work) / "release"
            write_big_release(BigRelease(options.entities, options.mentions, options.size), release, max(WORKERS))
        bare, builds = measure(release, Path(work) / "data", options.rounds)
    rows = [_row(workers, bare[workers], builds[workers]) for workers in WORKERS]
    _show(rows, builds, options.rounds)
    if options.json is not None:
        write_json(options.json, {"rows": rows})


def measure(release: Path, out: Path, rounds: int) -> tuple[dict[int, list[Pace]], dict[int, list[Prepared]]]:
    """The bare loop's and the builds' costs by number of workers, in every round."""
    images = [path for name in _FOLDERS for path in sorted((release / name).glob("*"))]
    for path in images:
        path.read_bytes()  # the first reader must not pay for the disk
    bare: dict[int, list[Pace]] = {workers: [] for workers in WORKERS}
    builds: dict[int, list[Prepared]] = {workers: [] for workers in WORKERS}
    with Processes(max(WORKERS)) as processes:
        for number in range(rounds):
            for workers in WORKERS:
                print(f"round {number + 1}, {workers} workers ...", file=sys.stderr, flush=True)
                shares = [(images[first::workers],) for first in range(workers)]
                bare[workers].append(processes.at_once(bare_loop, shares))
                with TemporaryDirectory(dir=out.parent) as folder:
                    builds[workers].append(_in_a_process(release, Path(folder) / "data", workers))
    return bare, builds


def bare_loop(paths: Sequence[Path]) -> Callable[[], int]:
    """The work: reads, decodes, resizes to a shorter side of SIZE and encodes."""

    def work() -> int:
        for path in paths:
            content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            image = decode_jpeg(content, mode=ImageReadMode.RGB)
            height, width = image.shape[1:]
            size = (round(SIZE * height / min(height, width)), round(SIZE * width / min(height, width)))
            small = functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]
            encode_jpeg(small, JPEG_QUALITY).numpy().tobytes()
        return len(paths)

    return work


def _in_a_process(release: Path, out: Path, workers: int) -> Prepared:
    """A build whose driver is a fresh process, so that memory is the build's alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_build, release, out, workers).result()


def _build(release: Path, out: Path, workers: int) -> Prepared:
    times: dict[str, list[tuple[float, int]]] = {}

    def note(stage: str, done: int, total: int) -> None:
        times.setdefault(stage, []).append((time.perf_counter(), done))

    before, start = _children_cpu(), time.perf_counter()
    source = MimicRelease(release)
    with run_in_processes(workers) as run:
        manifest = prepare(source, out, DatasetOptions(name="big"), run=run, progress=note)
    wall = time.perf_counter() - start
    with_image = manifest.entities_with_image + sum(counts.with_image for counts in manifest.splits.values())
    count = manifest.entities + sum(counts.mentions for counts in manifest.splits.values())
    if with_image != count:
        raise RuntimeError(f"{release}: {count - with_image} of {count} records have no picture; nothing to compare")
    made = [[(when, done) for when, done in times.get(stage, []) if done] for stage in _IMAGE_STAGES]
    spans = [(steady[-1][0] - steady[0][0], steady[-1][1] - steady[0][1]) for steady in made if len(steady) > 1]
    seconds, items = (sum(values) for values in zip(*spans, strict=True)) if spans else (0.0, 0)
    return Prepared(
        images=count,
        wall_s=wall,
        cpu_s=_children_cpu() - before,
        made_rate=items / seconds if seconds else float("nan"),
        stages={stage: ticks[-1][0] - ticks[0][0] for stage, ticks in times.items()},
        driver_peak=status_bytes("VmHWM"),
        worker_peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    )


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _row(workers: int, bare: Sequence[Pace], builds: Sequence[Prepared]) -> dict[str, Any]:
    """Middles of all rounds; ratios are of the same round."""
    pairs = list(zip(builds, bare, strict=True))
    return {
        "workers": workers,
        "pictures": builds[0].images,
        "bare_per_s": median(pace.rate for pace in bare),
        "whole_per_s": median(build.rate for build in builds),
        "shards_per_s": median(build.made_rate for build in builds),
        "bare_cpu_us": median(pace.cpu_us for pace in bare),
        "whole_cpu_us": median(1e6 * build.cpu_s / build.images for build in builds),
        "whole_ratio": median(build.rate / pace.rate for build, pace in pairs),
        "shards_ratio": median(build.made_rate / pace.rate for build, pace in pairs),
        "driver_peak_mib": max(build.driver_peak for build in builds) / 2**20,
        "worker_peak_mib": max(build.worker_peak for build in builds) / 2**20,
    }


def _show(rows: Sequence[dict[str, Any]], builds: dict[int, list[Prepared]], rounds: int) -> None:
    table = Table(title="Pictures a second: the bare loop and prepare")
    headings = ("workers", "bare", "whole", "shards", "whole : bare", "shards : bare", "CPU-us bare", "CPU-us whole")
    for heading in (*headings, "driver MiB", "worker MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates = [f"{row[name]:,.0f}" for name in ("bare_per_s", "whole_per_s", "shards_per_s")]
        ratios = [f"{row[name]:.2f}" for name in ("whole_ratio", "shards_ratio")]
        names = ("bare_cpu_us", "whole_cpu_us", "driver_peak_mib", "worker_peak_mib")
        table.add_row(str(row["workers"]), *rates, *ratios, *(f"{row[name]:,.0f}" for name in names))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    one, two = rows[0], rows[-1]
    scaling = ", ".join(
        f"{label} {two[name] / one[name]:.2f}"
        for label, name in (("bare", "bare_per_s"), ("whole", "whole_per_s"), ("shards", "shards_per_s"))
    )
    lines = [f"from 1 to {two['workers']} workers: {scaling}"]
    for workers, done in builds.items():
        stages = ", ".join(
            f"{stage} {median(b.stages.get(stage, 0.0) for b in done):.1f} s" for stage in done[0].stages
        )
        lines.append(f"{workers} workers: {median(build.wall_s for build in done):.1f} s ({stages})")
    lines.append(f"{rows[0]['pictures']:,} pictures, {rounds} rounds by turns, middles; one thread a process")
    for line in lines:
        console.print(line, highlight=False)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", type=Path, help="an existing release without faults (default: makes one)")
    parser.add_argument("--entities", type=positive, default=8000, help="default: 8000")
    parser.add_argument("--mentions", type=positive, default=2000, help="default: 2000")
    parser.add_argument("--size", type=positive, default=384, help="of the pictures made, in pixels (default: 384)")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    if options.release is not None and not MimicRelease.fits(options.release):
        parser.error(f"--release {options.release}: no release in the MIMIC layout")
    return options
