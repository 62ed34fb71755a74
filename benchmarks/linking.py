"""The command `python -m benchmarks.linking`: `dsmip link` of a file of mentions, against a bare loop over `link_many`.

The mentions are those of the run's test split, with their pictures, over and over. Each way has a process of its own,
one after the other. The rate is that of linking alone: from the first finished block on where Ray starts workers; the
seconds are of all that the way does once the model is known, workers' loading of it among them.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

import dsmip
from dsmip.linking import bulk
from dsmip.linking.bulk import BulkOptions
from dsmip.linking.load import LoadOptions
from dsmip.runs.run import Run
from ray_jobs.local_jobs.linking.many import link_mentions
from ray_jobs.local_jobs.linking.one import LinkModel
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import result_console

BARE = "bare loop"
_FEWEST_NOTES = 4


def main() -> None:
    """Parses the command line, measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="a finished run, such as demo/run")
    parser.add_argument("--data", help="where its data lies, if it has moved")
    parser.add_argument("--mentions", type=int, default=8192, help="how many are linked")
    parser.add_argument("--block", type=int, default=bulk.BLOCK_ROWS, help="how many of them are a block")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of Ray")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    rows = measure(given.run, given.data, given.mentions, given.block, given.workers)
    table = Table("way", "mentions/s", "share of the bare loop", "seconds")
    for row in rows:
        table.add_row(row["way"], f"{row['per_second']:.1f}", f"{row['share']:.2f}", f"{row['seconds']:.1f}")
    result_console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"mentions": given.mentions, "block": given.block, "rows": rows}, indent=2))


def measure(run: str, data: str | None, num_mentions: int, block: int, workers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for the bare loop, one process and each number of workers."""
    with TemporaryDirectory() as folder:
        source = _written(Path(folder), run, data, num_mentions)
        given = (run, data, str(source), block)
        ways: dict[str, tuple[Callable[..., tuple[float, float]], int]] = {BARE: (_bare, 0), "one process": (_here, 0)}
        ways |= {f"{count} Ray worker{'s' * (count > 1)}": (_on_ray, count) for count in workers}
        found: Mapping[str, tuple[float, float]] = {
            way: _in_a_process(work, (*given, count)) for way, (work, count) in ways.items()
        }
    bare = found[BARE][0]
    return [
        {"way": way, "per_second": rate, "share": rate / bare, "seconds": seconds}
        for way, (rate, seconds) in found.items()
    ]


def _written(folder: Path, run: str, data: str | None, num_mentions: int) -> Path:
    """The file of mentions; a line has what a user's would have."""
    mentions = list(Run.open(run, data).dataset.mentions("test"))
    for number, mention in enumerate(mentions):
        if mention.image is not None:
            (folder / f"{number}.jpg").write_bytes(mention.image)
    path = folder / "mentions.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(num_mentions):
            each = mentions[number % len(mentions)]
            image = None if each.image is None else f"{number % len(mentions)}.jpg"
            stream.write(json.dumps({"word": each.word, "sentence": each.sentence, "image": image}) + "\n")
    return path


def _in_a_process(work: Callable[..., tuple[float, float]], arguments: tuple[Any, ...]) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _bare(run: str, data: str | None, source: str, block: int, workers: int) -> tuple[float, float]:
    linker = dsmip.load(run, data=data)
    mentions = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    images = Path(source).parent
    next(linker.link_many(mentions[:1], images=images))
    started = time.perf_counter()
    done = sum(1 for _ in linker.link_many(mentions, images=images))
    seconds = time.perf_counter() - started
    return done / seconds, seconds


class _Clock(Display):
    """A display that notes when how many were linked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("mentions"):
            self.seen.append((time.perf_counter(), done))

    def show_steps(self, name: str, done: int, total: int, epoch: int, metrics: Mapping[str, float]) -> None:
        if done:
            self.seen.append((time.perf_counter(), done))

    @property
    def rate(self) -> float:
        """Mentions a second between the first and the last note.

        Raises:
            SystemExit: Notes are too few: blocks are finished together.
        """
        (first, begun), (last, done) = self.seen[0], self.seen[-1]
        if len({done for _, done in self.seen}) < _FEWEST_NOTES:
            raise SystemExit("too few blocks for a rate: give more --mentions, or a smaller --block")
        return (done - begun) / (last - first)


def _here(run: str, data: str | None, source: str, block: int, workers: int) -> tuple[float, float]:
    bulk.BLOCK_ROWS = block
    clock, out = _Clock(), Path(source).with_name("here.parquet")
    link_mentions(LinkModel(run, "cpu", LoadOptions(data=data)), source, out, BulkOptions(), clock)
    return clock.rate, clock.seen[-1][0] - clock.seen[0][0]


def _on_ray(run: str, data: str | None, source: str, block: int, workers: int) -> tuple[float, float]:
    from ray_jobs.cluster.connection import connected
    from ray_jobs.jobs.link import link_on_ray

    bulk.BLOCK_ROWS = block
    clock, out = _Clock(), Path(source).with_name(f"{workers}.parquet")
    with connected():
        started = time.perf_counter()
        model = LinkModel(run, "cpu", LoadOptions(data=data))
        link_on_ray(model, source, out, BulkOptions(), clock, workers=workers)
    return clock.rate, time.perf_counter() - started


if __name__ == "__main__":
    main()
