"""Memory that a ranking takes beside its index, by the number of entities.

    uv run python -m benchmarks.memory [--entities 10000 40000 160000] [--mentions 128]

Narrow systems with random weights rank as `dsmip evaluate` does: exact scores, the top 20, the index memory-mapped from
its files. Each ranking has a process of its own. What is printed is how far its resident memory grew while it ranked,
and what is left of that without the pages of files, which are the index's: the system may drop those at any time.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table as Printed

from benchmarks.ranking.cases import BLOCK, Case, build_matcher, feature_blocks
from dsmip.data.table import Table, concatenate
from dsmip.evaluation.index import SLICE_ROWS, EntityIndex, finish_index, index_slices
from dsmip.evaluation.preparation import prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel
from dsmip.planning.probing.measure import measured, status_bytes

CPU = torch.device("cpu")
MIB = 2**20
NARROW_TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@dataclass(frozen=True)
class Figures:
    """Of one ranking. peak_bytes: growth of resident memory; own_bytes: without pages of files. None: nobody tells."""

    index_bytes: int
    peak_bytes: int | None
    own_bytes: int | None
    wall_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all sizes one after the other and prints a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--entities", type=int, nargs="+", default=[10_000, 40_000, 160_000])
    parser.add_argument("--mentions", type=int, default=128, help="default: 128, as many as are ranked at a time")
    options = parser.parse_args(arguments)
    table = Printed(title="Memory of a ranking")
    for heading in ("case", "entities", "index MiB", "peak MiB", "beside the index", "s"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, num_entities, found in measure_all(options.entities, options.mentions):
        sizes = (found.index_bytes, found.peak_bytes, found.own_bytes)
        cells = ("?" if size is None else f"{size / MIB:,.0f}" for size in sizes)
        table.add_row(case.name, f"{num_entities:,}", *cells, f"{found.wall_s:.1f}")
    Console().print(table)


def measure_all(entity_counts: Sequence[int], num_mentions: int) -> Iterator[tuple[Case, int, Figures]]:
    """Every case at every number of entities."""
    with TemporaryDirectory() as folder:
        towers = Path(folder) / "narrow.json"
        towers.write_text(json.dumps(NARROW_TOWERS))
        for case in narrow_cases(str(towers)):
            for num_entities in entity_counts:
                print(f"measuring {case.name}, {num_entities} entities ...", file=sys.stderr, flush=True)
                index = Path(folder) / f"{case.name}-{num_entities}"
                build(case, index, num_entities)
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
                    yield case, num_entities, own_process.submit(rank_stored, case, index, num_mentions).result()


def narrow_cases(towers: str) -> tuple[Case, ...]:
    return (
        Case("mimic", "mimic", 12, architecture=towers, width=16),
        Case("dsmip", "dsmip", 12, masked=True, architecture=towers, width=16),
    )


def build(case: Case, folder: Path, num_entities: int) -> None:
    """The index of random entities, slice by slice."""
    matcher = build_matcher(case, CPU)
    blocks = feature_blocks(case, "entities", num_entities, CPU)

    def prepare(rows: range) -> Table:
        features = concatenate([own for _, own in islice(blocks, -(-len(rows) // BLOCK))])
        return prepare_in_tiles(matcher, features, "entities", CPU)

    assert SLICE_ROWS % BLOCK == 0
    slices = index_slices(folder, num_entities)
    for path, rows in slices.items():
        prepare(rows).save(path)
    finish_index(folder, {}, slices)


def rank_stored(case: Case, folder: Path, num_mentions: int) -> Figures:
    """Ranks random mentions against a stored index, in this process."""
    matcher, index = build_matcher(case, CPU), EntityIndex.open(folder, {})
    features = concatenate([own for _, own in feature_blocks(case, "mentions", num_mentions, CPU)])
    mentions = prepare_in_tiles(matcher, features, "mentions", CPU)
    gold_row_M = torch.arange(num_mentions) * 7919 % len(index)
    ranked = RankedModel(matcher, mentions, index, gold_row_M, case.choices)
    before = _file_bytes()
    _, cost = measured(lambda: ranked.rank(CPU, notice=lambda text: None), CPU)
    own_bytes = None if cost.peak_bytes is None else cost.peak_bytes - (_file_bytes() - before)
    return Figures(index.num_bytes, cost.peak_bytes, own_bytes, cost.wall_s)


def _file_bytes() -> int:
    """Resident pages of files; 0 where the system does not tell (nor does it tell the peak)."""
    try:
        return status_bytes("RssFile")
    except OSError:
        return 0
