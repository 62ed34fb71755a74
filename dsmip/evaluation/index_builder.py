"""The files that a ranking reads, made piece by piece: the slices of the entity index, and the mentions' table.

A piece is the same whoever makes it, and does not depend on other pieces: processes on any node can make them side by
side, and one that is there is never made again. Features of the kb come from the run's cache where
it has them. Else they are computed on the way and not kept: of a full-size kb they are larger than the index by far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.collate import gold_rows
from dsmip.data.manifest import KB
from dsmip.data.table import Table, concatenate
from dsmip.encoders.feature_cache import BATCH_SIZE, fingerprint, load_features, whole_features
from dsmip.evaluation.index import LAYOUT, MANIFEST, SLICE_ROWS, finish_index, index_slices
from dsmip.evaluation.preparation import picture_columns, prepare_in_tiles, share_picture
from dsmip.evaluation.ranked_model import RankedFiles, load_model
from dsmip.keys import Plain, plain_text
from dsmip.parallel import map_alone
from dsmip.progress import Progress, counting, no_progress
from dsmip.runs.part_features import PartFeatures, rows_of
from dsmip.runs.run import Run

CPU = torch.device("cpu")
_TILE = 512  # rows; two batches of the encoders


@dataclass(frozen=True)
class Pieces:
    """What the files of a ranking are made of, for processes on any node. Pieces go by their files' names."""

    files: RankedFiles
    slices: Mapping[str, range]
    num_mentions: int

    @property
    def missing(self) -> dict[str, int]:
        """Files that are not here yet, with the number of their items; none of a finished index."""
        mentions, folder = self.files.mentions, self.files.index
        missing = {} if mentions.is_file() else {mentions.name: self.num_mentions}
        if not (folder / MANIFEST).is_file():
            missing |= {name: len(rows) for name, rows in self.slices.items() if not (folder / name).is_file()}
        return missing

    def make(self, names: Sequence[str], device: torch.device, progress: Progress = no_progress) -> None:
        """Makes some of the pieces; those that are here are kept. Nobody else may make the same ones meanwhile.

        Raises UserError when the data set is damaged.
        """
        todo = {name: number for name, number in self.missing.items() if name in set(names)}
        if not todo:
            return
        maker = _Maker(self, device, progress)
        made = counting(progress, "entities and mentions prepared", sum(todo.values()))
        for name in todo:
            table = maker.entities(self.slices[name], made) if name in self.slices else maker.mentions(made)
            with self.files.storage.atomic(name) as temporary:
                table.to(CPU).save(temporary)

    def finish(self) -> RankedFiles:
        """The files, once all pieces are there. Raises UserError when one is missing or damaged."""
        storage, folder = self.files.storage, self.files.index
        storage.pull("")  # what other nodes have made
        finish_index(folder, dict(self.files.made_from), {folder / name: rows for name, rows in self.slices.items()})
        storage.push(MANIFEST)
        return self.files


def plan_pieces(
    run: Run,
    split: str,
    model: str,
    slice_rows: int = SLICE_ROWS,
    notice: Callable[[str], None] = lambda line: None,
) -> Pieces:
    """The pieces of a model's ranking on a split; an index of earlier weights is deleted.

    notice: takes a line about features that are read beside the shards.

    Raises UserError as `load_model` does.
    """
    matcher, config, _ = load_model(run, model)
    features = _features(run, config, model)
    sources = [of_part.cached(KB).name for of_part in features.values()]
    for part, of_part in features.items():
        if of_part.beside:
            sources.append(of_part.beside.name)
            notice(f"{part}: reads {of_part.beside}")
    made_from: dict[str, Plain] = {  # the folder's name hashes it in this order; LAYOUT is its version
        "model": model,
        "layout": [LAYOUT, slice_rows],
        "data": run.dataset.manifest_hash,
        "weights": fingerprint(matcher.state_dict(), "()"),
        "features": sorted(sources),
    }
    index = f"index/{model}-{fingerprint({}, plain_text((made_from,)))[:16]}"
    for outdated in run.storage.glob(f"index/{model}-{'[0-9a-f]' * 16}"):
        if outdated != index:
            run.storage.delete(outdated)  # of weights or features that are no more
    run.storage.pull(index)
    files = RankedFiles(run.storage.location, split, model, index, made_from)
    slices = index_slices(Path(), run.dataset.num_entities, slice_rows)
    return Pieces(files, {path.name: rows for path, rows in slices.items()}, len(gold_rows(run.dataset, split)))


def _features(run: Run, config: ExperimentConfig, model: str) -> dict[str, PartFeatures]:
    """The features that a model reads, by part; those of a whole are of its variant's parts."""
    if model == run.system.name and run.system.gated:
        parts = run.system.feature_parts(config.system)
        return {part: PartFeatures(run.home(part, config), part, config) for part in parts}
    return {model: PartFeatures(run, model, config)}


class _Maker:
    """Prepares items on one device; an encoder is loaded when it is first needed."""

    def __init__(self, pieces: Pieces, device: torch.device, progress: Progress) -> None:
        self._pieces, self._device, self._progress = pieces, device, progress
        self._run = Run.open(pieces.files.run)
        matcher, config, _ = load_model(self._run, pieces.files.model)
        self._matcher = matcher.to(device)
        self._features = _features(self._run, config, pieces.files.model)
        self._sources: dict[str, Callable[[range], Table]] = {}

    def entities(self, rows: range, progress: Callable[[int], None]) -> Table:
        """Prepared entities of these kb rows."""
        if not self._sources:
            self._sources = {part: features.kb_rows(self._device) for part, features in self._features.items()}
        prepared = self._prepared(rows, "entities", self._sources, progress)
        lacking_N = self._lacking_E[rows.start : rows.stop].to(self._device)
        if not (picture_columns(prepared) and bool(lacking_N.any())):
            return prepared
        return share_picture(prepared, self._alike, lacking_N)

    @cached_property
    def _lacking_E(self) -> Tensor:
        """bool [E]: entities without a picture."""
        num_images = self._run.dataset.entity_texts().column("num_images")
        return torch.tensor(num_images.to_numpy()) == 0

    @cached_property
    def _alike(self) -> Table:
        """The kb's first entity without a picture, encoded in its batch, prepared alone: the same for all slices."""
        row = int(self._lacking_E.nonzero()[0])
        start = row - row % BATCH_SIZE
        batch = range(start, min(start + BATCH_SIZE, len(self._lacking_E)))
        sources = {
            part: lambda rows, source=source: source(batch).take(slice(row - start, row - start + 1))
            for part, source in self._sources.items()
        }
        return self._prepared(range(row, row + 1), "entities", sources, lambda count: None)

    def _prepared(
        self, rows: range, side: str, sources: Mapping[str, Callable[[range], Table]], progress: Callable[[int], None]
    ) -> Table:
        """Prepared items of these rows, tile by tile. sources: what gives each part's features of some rows."""

        def prepare(tile: range) -> Table:
            tables = {part: source(tile) for part, source in sources.items()}
            features = whole_features(tables, list(tables)) if len(tables) > 1 else next(iter(tables.values()))
            return prepare_in_tiles(self._matcher, features, side, self._device)

        tiles = []
        for table in map_alone(
            prepare, [rows[start : start + _TILE] for start in range(0, len(rows), _TILE)], self._device
        ):
            tiles.append(table)
            progress(len(table))
        return concatenate(tiles)

    def mentions(self, progress: Callable[[int], None]) -> Table:
        """Prepared mentions. Their features go to the run's cache: several models read them."""
        split = self._pieces.files.split
        sources = {
            part: rows_of(load_features(features.files(split, self._device, self._progress)))
            for part, features in self._features.items()
        }
        return self._prepared(range(self._run.dataset.num_mentions(split)), "mentions", sources, progress)
