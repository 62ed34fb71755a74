"""The training stream against bare decoding: samples a second out of the shards of a prepared dataset.

    uv run python -m benchmarks.shards [--data DIR] [--entities 8000 --mentions 8000] [--json FILE]

A sample is a mention and its gold entity: two pictures, two texts. Bare decoding decodes the pictures of the same
samples, already in memory, with torchvision and with Pillow; the better of the two is what the stream is held against.
The stream with 0 workers is a plain loop; with n workers it is what n workers of a training do at once: each reads its
share of every batch, ahead in a thread. Bare decoding then runs in n processes too. All is of the first epoch: neither
texts nor pictures are known. "records" makes batches of encoded bytes, "pictures" decodes and fits them as well, "all"
tokenizes too. Without `--data` a release is made and prepared first. Run it alone: other programs take cores.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.data.big_release import BigRelease, positive, write_big_release
from benchmarks.data.processes import Pace, Processes
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.runners import run_in_processes
from data_prep.formats.mimic import MimicRelease
from dsmip.data.collate import Collator, ItemFormat, Modality
from dsmip.data.dataset import Dataset, TrainingBatch
from dsmip.data.text import Template
from dsmip.encoders.architecture import build_tokenizer
from dsmip.errors import UserError
from dsmip.parallel import read_ahead
from dsmip.storage.atomic import write_json

Decoder = Literal["torchvision", "Pillow"]
Work = Literal["records", "pictures", "all"]

WORKERS = (0, 1, 2)
ARCHITECTURE = "ViT-B-32"
SIZE = 224
_AHEAD = 4  # batches, as a training
_MODALITIES: dict[Work, tuple[Modality, ...]] = {"records": (), "pictures": ("image",), "all": ("text", "image")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the rows."""
    options = _options(arguments)
    with TemporaryDirectory(dir=options.work, prefix="shards-") as work:
        try:
            folder = options.data or _made(options, Path(work))
            paces = measure(folder, options.batch_size, options.samples, options.rounds)
        except UserError as error:
            sys.exit(str(error))
    rows = [_row(workers, paces) for workers in WORKERS]
    _show(rows, options)
    if options.json is not None:
        write_json(options.json, {"rows": rows})


def measure(folder: Path, batch_size: int, samples: int, rounds: int) -> dict[tuple[str, int], list[Pace]]:
    """Paces in samples, in every round, by (decoder or work, workers)."""
    jobs: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for count in WORKERS[1:]:
        for decoder in get_args(Decoder):
            jobs[decoder, count] = [(folder, batch_size, samples, rank, count, decoder) for rank in range(count)]
    for work in get_args(Work):
        jobs[work, 0] = [(folder, batch_size, samples, 0, 1, work, 0)]
    for count in WORKERS[1:]:
        jobs["all", count] = [(folder, batch_size, samples, rank, count, "all", _AHEAD) for rank in range(count)]
    paces: dict[tuple[str, int], list[Pace]] = {name: [] for name in jobs}
    with Processes(max(WORKERS)) as processes:
        for number in range(rounds):
            print(f"round {number + 1} ...", file=sys.stderr, flush=True)
            for (name, workers), shares in jobs.items():
                setup = decoding if name in get_args(Decoder) else streaming
                paces[name, workers].append(processes.at_once(setup, shares))
    return paces


def decoding(
    folder: Path, batch_size: int, samples: int, rank: int, world_size: int, decoder: Decoder
) -> Callable[[], int]:
    """The work: decodes the pictures of a worker's samples, which are read before."""
    batches = list(_batches(folder, batch_size, samples, rank, world_size))
    images = [record.image for batch in batches for record in batch.mentions]
    images += [image for batch in batches for record in batch.entities for image in record.images]
    encoded = [image for image in images if image is not None]
    num_samples = sum(len(batch.mentions) for batch in batches)
    if not encoded:
        raise UserError(f"{folder}: its training samples have no pictures; nothing to compare")

    def work() -> int:
        for content in encoded:
            if decoder == "torchvision":
                decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            else:
                with Image.open(io.BytesIO(content)) as image:
                    torch.from_numpy(np.array(image.convert("RGB")))
        return num_samples

    return work


def streaming(
    folder: str | Path, batch_size: int, samples: int, rank: int, world_size: int, kind: Work, ahead: int
) -> Callable[[], int]:
    """The work: makes a worker's batches, in a thread if `ahead` of their use."""
    tokenizer = build_tokenizer(ARCHITECTURE)
    collator = Collator(tokenizer, ItemFormat(Template(), modalities=_MODALITIES[kind]), SIZE)

    def made() -> Iterator[int]:
        for batch in _batches(folder, batch_size, samples, rank, world_size):
            if kind != "records":
                collator.mentions(batch.mentions)
                collator.entities(batch.entities)
            yield len(batch.mentions)

    return lambda: sum(read_ahead(made(), ahead) if ahead else made())


def _batches(folder: str | Path, batch_size: int, samples: int, rank: int, world_size: int) -> Iterator[TrainingBatch]:
    """A worker's batches of the first epoch, as many as hold `samples` over all workers."""
    batches = Dataset.open(folder).training_batches(
        "train", batch_size, seed=0, epoch=0, rank=rank, world_size=world_size
    )
    return islice(batches, -(-samples // batch_size))


def _made(options: argparse.Namespace, work: Path) -> Path:
    """A dataset of pictures of the towers' size."""
    print("writing and preparing a release ...", file=sys.stderr, flush=True)
    workers = max(WORKERS)
    write_big_release(BigRelease(options.entities, options.mentions), work / "release", workers)
    with run_in_processes(workers) as run:
        prepare(MimicRelease(work / "release"), work / "data", DatasetOptions(name="big"), run=run)
    return work / "data"


def _row(workers: int, paces: dict[tuple[str, int], list[Pace]]) -> dict[str, Any]:
    """Middles of all rounds; the ratio is of the same round, to the better decoder in as many processes."""
    processes = max(1, workers)
    best = max(get_args(Decoder), key=lambda decoder: median(pace.rate for pace in paces[decoder, processes]))
    pairs = list(zip(paces["all", workers], paces[best, processes], strict=True))
    return {
        "workers": workers,
        "samples": pairs[0][0].count,
        "decoder": best,
        **{f"{decoder}_per_s": median(p.rate for p in paces[decoder, processes]) for decoder in get_args(Decoder)},
        **{
            f"{work}_per_s": median(p.rate for p in paces[work, workers])
            for work in get_args(Work)
            if (work, workers) in paces
        },
        "ratio": median(stream.rate / bare.rate for stream, bare in pairs),
        "cpu_ratio": median(bare.cpu_us / stream.cpu_us for stream, bare in pairs),
    }


def _show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title="Samples a second: bare decoding and the training stream")
    names = [f"{name}_per_s" for name in (*get_args(Decoder), *get_args(Work))]
    for heading in ("workers", *get_args(Decoder), *get_args(Work), "all : bare", "in CPU time"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates = [f"{row[name]:,.0f}" if name in row else "" for name in names]
        table.add_row(str(row["workers"]), *rates, f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{rows[0]['samples']:,} samples in batches of {options.batch_size}, {options.rounds} rounds by turns, "
        "middles; one thread a process",
        highlight=False,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a prepared dataset (default: makes one)")
    parser.add_argument("--entities", type=positive, default=8000, help="of the dataset made (default: 8000)")
    parser.add_argument("--mentions", type=positive, default=8000, help="of the dataset made (default: 8000)")
    parser.add_argument("--samples", type=positive, default=5600, help="at most (default: 5600)")
    parser.add_argument("--batch-size", type=positive, default=128, help="default: 128")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args(arguments)
