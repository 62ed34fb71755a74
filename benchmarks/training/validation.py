"""Preparing a knowledge base for a validation, with towers that train: how long, and how much of it the encoder waits.

    uv run python -m benchmarks.training.validation [--config demo] [--data DIR] [--rounds 3] [--json FILE]

Three ways take turns, each round: one after the other (a batch is read, decoded and tokenized, then encoded), ahead (as
validations do), and again (what a frozen vision trunk said is kept: every validation but the first). The text tower
trains, with its projections (`tune: text`), so that all three encode the same. Encoder and units have one thread.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table as Printed

from benchmarks.data.big_release import positive, prepared_release
from dsmip.config import BackboneConfig
from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.encoders.architecture import build_tokenizer, resolve_architecture
from dsmip.encoders.feature_cache import BATCH_SIZE, chunked, item_batches
from dsmip.errors import UserError
from dsmip.evaluation.preparation import prepare_batches
from dsmip.models.dsmip import Dsmip
from dsmip.runs.load_config import load_config
from dsmip.storage.atomic import write_json
from dsmip.training.validation.kept_trunks import KeptTrunks
from dsmip.units.expert import Expert, ExpertConfig

PART = "multimodal"
WAYS = ("one after the other", "ahead", "again")
_FEW_MENTIONS = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the figures."""
    options = _options(arguments)
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=options.work, prefix="validation-") as work:
        try:
            folder = options.data or prepared_release(options.entities, _FEW_MENTIONS, Path(work))
            found = measure(Dataset.open(folder), options.config, options.rounds)
        except UserError as error:
            sys.exit(str(error))
    table = Printed(title=f"{int(found['entities'])} entities, {options.rounds} rounds")
    for heading in ("", "s", "the encoder waits", "CPU s", "times as fast"):
        table.add_column(heading, justify="right" if heading else "left")
    for way in WAYS:
        figures = [found[f"{way}: {name}"] for name in ("s", "wait share", "CPU s", "times as fast")]
        table.add_row(way, f"{figures[0]:.2f}", f"{figures[1]:.1%}", f"{figures[2]:.2f}", f"{figures[3]:.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.json is not None:
        write_json(options.json, found)


def measure(dataset: Dataset, config_name: str, rounds: int) -> dict[str, float]:
    """Middles over rounds; `times as fast` is against one after the other, in the same round."""
    config = load_config(config_name, ["backbone.pretrained=null"])
    architecture = config.backbone.architecture
    network, item_format = resolve_architecture(architecture), Dsmip.item_format(config.system, PART)
    backbone = BackboneConfig(architecture=architecture)
    made = Expert.build(
        PART, ExpertConfig(tune="text"), backbone, config.system.width, mask_padding=True, with_encoder=True
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matcher, rows = made.to(device), range(dataset.num_entities)

    def collator() -> Collator:  # a new one: a large knowledge base's pictures are not in its memory
        return Collator(build_tokenizer(architecture), item_format, network.image_size)

    kept = KeptTrunks(matcher, dataset, collator(), device, sys.exit)
    ways: dict[str, Callable[[], Iterator[ItemBatch]]] = {
        WAYS[0]: lambda: _one_after_the_other(dataset, collator()),
        WAYS[1]: lambda: item_batches(KB, dataset, collator()),
        WAYS[2]: lambda: kept.batches(KB, rows),
    }
    prepare_batches(kept.batches(KB, rows), KB, matcher, device)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        first = 0.0
        for way, batches in ways.items():
            waited = [0.0]
            wall, cpu = time.perf_counter(), time.process_time()
            prepare_batches(_timed(batches(), waited), KB, matcher, device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            first = first or wall
            figures = {"s": wall, "wait share": waited[0] / wall, "CPU s": cpu, "times as fast": first / wall}
            for name, value in figures.items():
                found.setdefault(f"{way}: {name}", []).append(value)
    return {"entities": float(dataset.num_entities)} | {name: median(values) for name, values in found.items()}


def _one_after_the_other(dataset: Dataset, collator: Collator) -> Iterator[ItemBatch]:
    return (collator.entities(chunk) for chunk in chunked(dataset.entities(), BATCH_SIZE))


def _timed(batches: Iterator[ItemBatch], waited: list[float]) -> Iterator[ItemBatch]:
    """The batches; seconds that they were waited for are added to `waited`."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        waited[0] += time.perf_counter() - started
        if batch is None:
            return
        yield batch


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.training.validation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="demo", help="of DSMIP, a shipped name or a YAML file (default: demo)")
    parser.add_argument("--data", type=Path, help="a prepared dataset (default: makes one)")
    parser.add_argument("--entities", type=positive, default=3000, help="of the dataset made (default: 3000)")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    parser.add_argument("--work", type=Path, help="folder for what is written on the way (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
