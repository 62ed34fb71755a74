"""A bundle of as many entities as are asked for, with random weights: what serving costs depends on sizes alone.

A small release is prepared, and a system of ViT-B/32 with random weights is exported on it. The index's rows are those
of its entities over and over, each number changed a little, so that no two entities tie.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.data.big_release import BigRelease, write_big_release
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.data.table import Column, Ragged, Repeated, Table
from dsmip.evaluation.index import SLICE_ROWS, EntityIndex, finish_index, index_slices
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.linking.bundle import BUNDLE, ENTITIES, INDEX, BundleManifest, read_manifest, stated_files
from dsmip.progress import Progress, counting, no_progress
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json

ARCHITECTURE = "ViT-B-32"
_SEEDS, _MENTIONS, _IMAGE = 64, 64, 224
_CHANGE = 0.05  # of each number, times what is usual in its column


def write_big_bundle(
    folder: Path,
    num_entities: int,
    system: str = "dsmip",
    architecture: str = ARCHITECTURE,
    progress: Progress = no_progress,
) -> tuple[Path, list[Mention]]:
    """Writes the bundle into a folder, and mentions with pictures to ask it for.

    Args:
        folder: A new one; the release, its data and the run stay beside the bundle.
        num_entities: How many.
        system: Which, with its default settings.
        architecture: Of the backbone.
        progress: Of the index.

    Returns:
        The bundle, and the mentions.
    """
    write_big_release(BigRelease(_SEEDS, _MENTIONS, _IMAGE), folder / "release")
    prepare(MimicRelease(folder / "release"), folder / "data", DatasetOptions(name="big"))
    dataset = Dataset.open(folder / "data")
    settings = {"gate": {"picture": "clip"}} if system == "dsmip" else {}
    config = parse_config({"model": system, "backbone": {"architecture": architecture}, "system": settings})
    run = Run.create(folder / "run", config, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in run.part_names:
            run.save_part(name, run.system.build_part(name, config, with_encoder=True), {})
        if run.system.gated:
            run.save_part(run.system.name, run.system.build_whole(config), {})
    bundle = folder / "bundle"
    export_run(run.folder, bundle, torch.device("cpu"), ExportOptions())
    _grow(bundle, num_entities, progress)
    return bundle, list(dataset.mentions("train"))


def _grow(bundle: Path, num_entities: int, progress: Progress) -> None:
    """Puts another index and table in the place of the bundle's own, and bundle.json last."""
    manifest, _ = read_manifest(bundle)
    index, generator = EntityIndex.open(bundle / INDEX, {}), torch.Generator().manual_seed(0)
    seeds = index.take(torch.arange(len(index)))
    texts = pq.read_table(bundle / ENTITIES)
    grown = bundle / "grown"
    grown.mkdir()
    count = counting(progress, "entities written", num_entities)
    slices = index_slices(grown, num_entities, SLICE_ROWS)
    for path, rows in slices.items():
        chosen = seeds.take(torch.arange(rows.start, rows.stop) % len(seeds))
        Table({name: _changed(column, generator) for name, column in chosen.columns.items()}).save(path)
        count(len(rows))
    finish_index(grown, {}, slices)
    for path in (bundle / INDEX).iterdir():
        path.unlink()
    (bundle / INDEX).rmdir()
    grown.rename(bundle / INDEX)
    with pq.ParquetWriter(bundle / "grown.parquet", texts.schema) as writer:
        for table in _texts(texts, num_entities):
            writer.write_table(table, row_group_size=len(texts))
    (bundle / "grown.parquet").replace(bundle / ENTITIES)
    (bundle / BUNDLE).unlink()
    tree = manifest.model_dump(mode="json") | {"entities": num_entities}
    made = BundleManifest.model_validate(tree | {"files": stated_files(bundle)}, strict=False)
    write_json(bundle / BUNDLE, made.model_dump(mode="json"))


def _changed(column: Column, generator: torch.Generator) -> Column:
    if isinstance(column, Ragged):
        return Ragged(_noisy(column.values, generator), column.starts, column.lengths)
    return column if isinstance(column, Repeated) else _noisy(column, generator)


def _noisy(values: Tensor, generator: torch.Generator) -> Tensor:
    if not values.is_floating_point() or not values.numel():
        return values
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float32).to(values.dtype)
    return values + _CHANGE * values.float().std().nan_to_num().to(values.dtype) * noise


def _texts(seeds: pa.Table, num_entities: int) -> Iterator[pa.Table]:
    """The entities' texts and pictures over and over, under ids of their own."""
    column = seeds.schema.get_field_index("entity_id")
    for start in range(0, num_entities, len(seeds)):
        part = seeds.slice(0, min(len(seeds), num_entities - start))
        ids = pa.array([f"Q{start + row}" for row in range(len(part))], pa.string())
        yield part.set_column(column, seeds.schema.field(column), ids)
