"""The opened evaluation, and what builds the files that its ranking reads.

<run>/index/<model>-<hash>/                     the entity index (see `dsmip.evaluation.index`)
<run>/index/<model>-<hash>/<split>.safetensors  the mentions' table: prepared once, so that all workers score the same

An index slice is the same whoever builds it, and does not depend on others: processes on any node can build them side
by side, and one that is there is never built again. Features of the kb come from the run's cache where it has them.
Else they are computed on the way and not kept: of a full-size kb they are larger than the index by far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmip.data.collate import gold_rows
from dsmip.data.manifest import KB, SPLITS
from dsmip.data.records import Mention
from dsmip.data.table import Table, concatenate
from dsmip.encoders.feature_cache import BATCH_SIZE, fingerprint, load_features, whole_features
from dsmip.errors import UserError
from dsmip.evaluation.index import LAYOUT, MANIFEST, SLICE_ROWS, EntityIndex, finish_index, index_slices
from dsmip.evaluation.preparation import entities_with_image, prepare_in_tiles, sharing_image
from dsmip.evaluation.ranking import RankedModel
from dsmip.keys import Plain, plain_text
from dsmip.parallel import map_alone
from dsmip.progress import CountRows, Progress, counting, no_progress
from dsmip.runs.loaded_model import model_names
from dsmip.runs.part_features import PartFeatures, rows_of
from dsmip.runs.run import Run
from dsmip.storage.locations import open_run_storage
from dsmip.storage.run_storage import RunStorage

CPU = torch.device("cpu")
_TILE = 512  # rows; two batches of the encoders


class OpenedEvaluation:
    """One model of a run on one split: the run is opened, the model is loaded and the split's shards are read once.

    Attributes:
        run: with a dataset that holds the split's mentions.
        split: train, validation or test.
        model: on the CPU until something is prepared or ranked.
    """

    def __init__(self, run: Run, split: str, model: str | None = None) -> None:
        """
        Args:
            run: any opened run; its data are read when they are needed.
            split: of its data.
            model: a finished part, or the system's name for the gated whole (default: the whole, if there is one).

        Raises:
            UserError: there is no such split or model, or it is not trained yet.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'; there are {', '.join(SPLITS)}")
        self.run, self.split = replace(run, dataset=run.dataset.holding(split)), split
        self.model = self.run.load_model(model or model_names(run.config)[0])

    @cached_property
    def mentions(self) -> list[Mention]:
        """The split's records, in shard order."""
        return list(self.run.dataset.mentions(self.split))

    @cached_property
    def gold_row_M(self) -> Tensor:
        """kb rows int64 [M].

        Raises:
            UserError: As `gold_rows` says.
        """
        return gold_rows(self.run.dataset, self.split)

    @cached_property
    def entity_ids(self) -> list[str]:
        """Of the whole kb, by row."""
        ids: list[str] = self.run.dataset.entity_texts().column("entity_id").to_pylist()
        return ids

    @cached_property
    def features(self) -> dict[str, PartFeatures]:
        """What the model reads, by part; those of a gated whole are of its variant's parts."""
        config = self.model.config
        return {part: PartFeatures(self.run.home(part, config), part, config) for part in self.model.feature_parts}

    def release_encoders(self) -> None:
        """Frees the encoders, once all is prepared: they may lie on a GPU that the ranking needs."""
        self.__dict__.pop("features", None)


@dataclass(frozen=True)
class RankingFiles:
    """The files of one model's ranking on one split, for processes on any node; each goes by its name.

    Attributes:
        run: its location.
        data: its data's.
        split: of the mentions.
        model: its name in the run.
        name: the index's folder, below the run.
        made_from: what the index depends on.
        slices: kb rows by file.
        gold_row_M: kb rows int64 [M] of the split's golds.
    """

    run: str
    data: str
    split: str
    model: str
    name: str
    made_from: Mapping[str, Plain]
    slices: Mapping[str, range]
    gold_row_M: Tensor = field(compare=False)

    @property
    def storage(self) -> RunStorage:
        """Of the index's folder."""
        return open_run_storage(self.run) / self.name

    @property
    def index(self) -> Path:
        """The folder on this node."""
        return self.storage.folder

    @property
    def mentions(self) -> Path:
        """The mentions' table."""
        return self.index / f"{self.split}.safetensors"

    @property
    def missing(self) -> dict[str, int]:
        """Files that are not here yet, with the number of their items; no slices of a finished index."""
        mentions, folder = self.mentions, self.index
        missing = {} if mentions.is_file() else {mentions.name: len(self.gold_row_M)}
        if not (folder / MANIFEST).is_file():
            missing |= {name: len(rows) for name, rows in self.slices.items() if not (folder / name).is_file()}
        return missing

    def opened(self) -> OpenedEvaluation:
        """The evaluation that they belong to, opened in this process."""
        return OpenedEvaluation(Run.open(self.run, self.data), self.split, self.model)

    def build(
        self,
        names: Sequence[str],
        device: torch.device,
        progress: Progress = no_progress,
        evaluation: OpenedEvaluation | None = None,
    ) -> None:
        """Builds some of the files; those that are here are kept. Nobody else may build the same ones meanwhile.

        Args:
            names: of the files.
            device: where items are encoded and prepared.
            progress: counts prepared items.
            evaluation: where it is open in this process (default: it is opened, if anything is missing).

        Raises:
            UserError: the data set is damaged.
        """
        todo = {name: number for name, number in self.missing.items() if name in set(names)}
        if not todo:
            return
        preparer = _Preparer(evaluation or self.opened(), device, progress)
        prepared = counting(progress, "entities and mentions prepared", sum(todo.values()))
        for name in todo:
            rows = self.slices.get(name)
            table = preparer.mentions(prepared) if rows is None else preparer.entities(rows, prepared)
            with self.storage.atomic(name) as temporary:
                table.to(CPU).save(temporary)

    def finish(self) -> None:
        """Writes the index's manifest, once all slices are there.

        Raises:
            UserError: One is missing or damaged.
        """
        storage, folder = self.storage, self.index
        storage.pull("")  # what other nodes have built
        finish_index(folder, dict(self.made_from), {folder / name: rows for name, rows in self.slices.items()})
        storage.push(MANIFEST)

    def open(self, evaluation: OpenedEvaluation | None = None) -> RankedModel:
        """The model with its index and mentions, memory-mapped; the model on the CPU.

        Args:
            evaluation: where it is open in this process (default: it is opened).

        Raises:
            UserError: a file is missing or damaged.
        """
        model = (evaluation or self.opened()).model
        if evaluation is None:
            self.storage.pull("")
        index = EntityIndex.open(self.index, dict(self.made_from))
        try:
            mentions = Table.load(self.mentions)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.mentions} is missing or damaged ({error}); delete it and evaluate again") from error
        return RankedModel(model.matcher, mentions, index, self.gold_row_M, model.choices)


def plan_files(
    evaluation: OpenedEvaluation,
    slice_rows: int = SLICE_ROWS,
    notice: Callable[[str], None] = lambda line: None,
) -> RankingFiles:
    """The files of an evaluation's ranking; an index of earlier weights or features is deleted.

    Args:
        evaluation: what is ranked.
        slice_rows: kb rows of an index slice.
        notice: takes a line about features that are read beside the shards.

    Raises:
        UserError: the split has no mentions, or one whose gold is not in the kb; the model cannot be indexed.
    """
    run, model, features = evaluation.run, evaluation.model, evaluation.features
    if reason := model.matcher.why_not_indexed():
        raise UserError(f"{run.storage.location}: {model.name} has no index: {reason}")
    gold_row_M = evaluation.gold_row_M
    sources = [of_part.cached(KB).name for of_part in features.values()]
    for part, of_part in features.items():
        if of_part.beside:
            sources.append(of_part.beside.name)
            notice(f"{part}: reads {of_part.beside}")
    made_from: dict[str, Plain] = {  # the folder's name hashes it in this order; LAYOUT is its version
        "model": model.ranked_by,
        "layout": [LAYOUT, slice_rows],
        "data": run.dataset.manifest_hash,
        "weights": fingerprint(model.matcher.state_dict(), "()"),
        "features": sorted(sources),
    }
    index = f"index/{model.ranked_by}-{fingerprint({}, plain_text((made_from,)))[:16]}"
    for outdated in run.storage.glob(f"index/{model.ranked_by}-{'[0-9a-f]' * 16}"):
        if outdated != index:
            run.storage.delete(outdated)  # of weights or features that are no more
    run.storage.pull(index)
    slices = {path.name: rows for path, rows in index_slices(Path(), run.dataset.num_entities, slice_rows).items()}
    where = run.storage.location, run.dataset.location
    return RankingFiles(*where, evaluation.split, model.ranked_by, index, made_from, slices, gold_row_M)


class _Preparer:
    """Prepares the items of an opened evaluation on one device; an encoder is loaded when it is first needed."""

    def __init__(self, evaluation: OpenedEvaluation, device: torch.device, progress: Progress) -> None:
        self._device, self._progress = device, progress
        self._dataset, self._split = evaluation.run.dataset, evaluation.split
        self._matcher, self._features = evaluation.model.matcher.to(device), evaluation.features
        self._sources: dict[str, Callable[[range], Table]] = {}
        self._alone = cache(self._prepared_alone)  # all slices share one row

    def entities(self, rows: range, count_rows: CountRows) -> Table:
        """Prepared entities of these kb rows."""
        if not self._sources:
            self._sources = {part: features.kb_rows(self._device) for part, features in self._features.items()}
        prepared = self._prepared(rows, "entities", self._sources, count_rows)
        return sharing_image(self._matcher, prepared, rows, self._lacking_E, self._alone)

    @cached_property
    def _lacking_E(self) -> Tensor:
        """bool [E]: entities without a picture."""
        return ~entities_with_image(self._dataset)

    def _prepared_alone(self, row: int) -> Table:
        """An entity, encoded in its batch, prepared in a call of its own."""
        start = row - row % BATCH_SIZE
        batch = range(start, min(start + BATCH_SIZE, len(self._lacking_E)))
        sources = {
            part: lambda rows, source=source: source(batch).take(slice(row - start, row - start + 1))
            for part, source in self._sources.items()
        }
        return self._prepared(range(row, row + 1), "entities", sources, lambda count: None)

    def _prepared(
        self, rows: range, side: str, sources: Mapping[str, Callable[[range], Table]], count_rows: CountRows
    ) -> Table:
        """Prepared items of these rows, tile by tile; `sources` give each part's features of some rows."""

        def prepare(tile: range) -> Table:
            tables = {part: source(tile) for part, source in sources.items()}
            features = whole_features(tables, list(tables)) if len(tables) > 1 else next(iter(tables.values()))
            return prepare_in_tiles(self._matcher, features, side, self._device)

        tiles = []
        for table in map_alone(
            prepare, [rows[start : start + _TILE] for start in range(0, len(rows), _TILE)], self._device
        ):
            tiles.append(table)
            count_rows(len(table))
        return concatenate(tiles)

    def mentions(self, count_rows: CountRows) -> Table:
        """Prepared mentions. Their features go to the run's cache: several models read them."""
        sources = {
            part: rows_of(load_features(features.files(self._split, self._device, self._progress)))
            for part, features in self._features.items()
        }
        return self._prepared(range(self._dataset.num_mentions(self._split)), "mentions", sources, count_rows)
