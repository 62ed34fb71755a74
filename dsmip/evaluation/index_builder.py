"""The opened model and evaluation, and what builds the files that a ranking reads.

<run>/index/<model>-<hash>/                     the entity index (see `dsmip.evaluation.index`)
<run>/index/<model>-<hash>/<split>.safetensors  the mentions' table: prepared once, so that all workers score the same

An index slice is the same whoever builds it, and does not depend on others: processes on any node can build them side
by side, and one that is there is never built again. Features of the kb come from the run's cache where it has them.
Else they are computed on the way and not kept: of a full-size kb they are larger than the index by far.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmip.data.collate import gold_rows
from dsmip.data.manifest import KB, SPLITS, UNKNOWN_OF
from dsmip.data.records import Mention
from dsmip.data.table import Table
from dsmip.encoders.feature_keys import fingerprint
from dsmip.errors import UserError
from dsmip.evaluation.index import LAYOUT, MANIFEST, SLICE_ROWS, EntityIndex, finish_index, index_slices
from dsmip.evaluation.preparation import Preparer
from dsmip.evaluation.ranking import RankedModel
from dsmip.keys import Plain, plain_text
from dsmip.progress import Progress, counting, no_progress
from dsmip.runs.loaded_model import model_names
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.storage.locations import open_run_storage
from dsmip.storage.run_storage import RunStorage

CPU = torch.device("cpu")


class OpenedModel:
    """One model of a run, loaded, with what encodes its items.

    Attributes:
        run: an opened run; its data are read when they are needed.
        model: on the CPU until something is prepared or ranked.
    """

    def __init__(self, run: Run, model: str | None = None) -> None:
        """
        Args:
            run: any opened run.
            model: a finished part, or the system's name for the gated whole (default: the whole, if there is one).

        Raises:
            UserError: there is no such model, or it is not trained yet.
        """
        self.run, self.model = run, run.load_model(model or model_names(run.config)[0])

    @cached_property
    def features(self) -> dict[str, PartFeatures]:
        """What the model reads, by part; those of a gated whole are of its variant's parts."""
        config = self.model.config
        return {part: PartFeatures(self.run.home(part, config), part, config) for part in self.model.feature_parts}

    def release_encoders(self) -> None:
        """Frees the encoders, once all is prepared: they may lie on a GPU that the ranking needs."""
        self.__dict__.pop("features", None)


class OpenedEvaluation(OpenedModel):
    """One model of a run on one split: the run is opened, the model is loaded and the split's shards are read once.

    Attributes:
        run: with a dataset that holds the split's mentions.
        split: train, validation or test; of `of_unknown`, where these have mentions without a gold in the kb.
    """

    def __init__(self, run: Run, split: str, model: str | None = None) -> None:
        """
        Args:
            run: any opened run; its data are read when they are needed.
            split: of its data.
            model: as for `OpenedModel`.

        Raises:
            UserError: there is no such split or model, or it is not trained yet.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split '{split}'; there are {', '.join(SPLITS)}")
        super().__init__(replace(run, dataset=run.dataset.holding(split)), model)
        self.split = split

    def of_unknown(self) -> "OpenedEvaluation | None":
        """The same model on the split's mentions that have no gold in the kb; None where none were kept."""
        section = UNKNOWN_OF[self.split]
        if section not in self.run.dataset.manifest.sections:
            return None
        other = copy(self)
        for name in ("mentions", "gold_row_M"):
            other.__dict__.pop(name, None)
        other.run, other.split = replace(self.run, dataset=self.run.dataset.holding(section)), section
        return other

    @cached_property
    def mentions(self) -> list[Mention]:
        """The split's records, in shard order."""
        return list(self.run.dataset.mentions(self.split))

    @cached_property
    def gold_row_M(self) -> Tensor:
        """kb rows int64 [M]; the first row for mentions without a gold, whose ranks nobody reads.

        Raises:
            UserError: As `gold_rows` says.
        """
        if self.split not in SPLITS:
            return torch.zeros(len(self.mentions), dtype=torch.int64)
        return gold_rows(self.run.dataset, self.split)

    @cached_property
    def entity_ids(self) -> list[str]:
        """Of the whole kb, by row."""
        ids: list[str] = self.run.dataset.entity_texts().column("entity_id").to_pylist()
        return ids


@dataclass(frozen=True)
class RankingFiles:
    """The files of one model's ranking on one split, for processes on any node; each goes by its name.

    Attributes:
        run: its location.
        data: its data's.
        split: of the mentions.
        model: its name in the run.
        unknown: whether they are those of it that have no gold in the kb.
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
    unknown: bool = False

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
        return self.index / f"{UNKNOWN_OF[self.split] if self.unknown else self.split}.safetensors"

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
        opened = OpenedEvaluation(Run.open(self.run, self.data, any_data=True), self.split, self.model)
        return (self.unknown and opened.of_unknown()) or opened

    def of(self, strangers: OpenedEvaluation) -> "RankingFiles":
        """The files of the split's mentions that have no gold in the kb, with the same index."""
        return replace(self, gold_row_M=strangers.gold_row_M, unknown=True)

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
        opened = evaluation or self.opened()
        preparer = Preparer(opened.model.matcher, opened.features, opened.run.dataset, device, progress)
        prepared = counting(progress, "entities and mentions prepared", sum(todo.values()))
        for name in todo:
            rows = self.slices.get(name)
            table = preparer.mentions(opened.split, prepared) if rows is None else preparer.entities(rows, prepared)
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


@dataclass(frozen=True)
class IndexPlan:
    """Where a model's index lies, or will, below the run.

    Attributes:
        name: the index's folder.
        made_from: what the index depends on.
        slices: kb rows by file.
    """

    name: str
    made_from: Mapping[str, Plain]
    slices: Mapping[str, range]


def plan_index(
    opened: OpenedModel, slice_rows: int = SLICE_ROWS, notice: Callable[[str], None] = lambda line: None
) -> IndexPlan:
    """The index of a model over the run's data, for any mentions.

    Args:
        opened: the model.
        slice_rows: kb rows of an index slice.
        notice: takes a line about features that are read beside the shards.

    Raises:
        UserError: the model ranks whole splits alone.
    """
    if fixed := opened.model.matcher.fixed_batches():
        raise UserError(
            f"{opened.run.storage.location}: {opened.model.name} ranks whole splits ('dsmip evaluate') and links no "
            f"mention: {fixed.reason}"
        )
    return _plan(opened, slice_rows, notice)


def _plan(opened: OpenedModel, slice_rows: int, notice: Callable[[str], None]) -> IndexPlan:
    """An index; one of earlier weights or features of these data is deleted."""
    run, model, features = opened.run, opened.model, opened.features
    sources = [of_part.name(KB) for of_part in features.values()]
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
    if fixed := model.matcher.fixed_batches():
        made_from["together"] = [fixed.mentions, fixed.entities]
    if run.feature_dtype != torch.float32:
        made_from["computed"] = "float32"  # earlier versions prepared some systems' items in half precision
    index = f"{run.below}index/{model.ranked_by}-{fingerprint({}, plain_text((made_from,)))[:16]}"
    for outdated in run.storage.glob(f"{run.below}index/{model.ranked_by}-{'[0-9a-f]' * 16}"):
        if outdated != index:
            run.storage.delete(outdated)  # of weights or features that are no more
    run.storage.pull(index)
    slices = {path.name: rows for path, rows in index_slices(Path(), run.dataset.num_entities, slice_rows).items()}
    return IndexPlan(index, made_from, slices)


def built_index(
    opened: OpenedModel, plan: IndexPlan, device: torch.device, progress: Progress = no_progress
) -> EntityIndex:
    """The index of a model, memory-mapped; what is missing of it is built first.

    Raises:
        UserError: the data set is damaged.
    """
    storage = opened.run.storage / plan.name
    files = {storage.folder / name: rows for name, rows in plan.slices.items()}
    if not (storage.folder / MANIFEST).is_file():
        missing = {path: rows for path, rows in files.items() if not path.is_file()}
        preparer = Preparer(opened.model.matcher, opened.features, opened.run.dataset, device, progress)
        prepared = counting(progress, "entities prepared", sum(map(len, missing.values())))
        for path, rows in missing.items():
            with storage.atomic(path.name) as temporary:
                preparer.entities(rows, prepared).to(CPU).save(temporary)
        finish_index(storage.folder, dict(plan.made_from), files)
        storage.push(MANIFEST)
    return EntityIndex.open(storage.folder, dict(plan.made_from))


def plan_files(
    evaluation: OpenedEvaluation,
    slice_rows: int = SLICE_ROWS,
    notice: Callable[[str], None] = lambda line: None,
) -> RankingFiles:
    """The files of an evaluation's ranking.

    Args:
        evaluation: of the model.
        slice_rows: kb rows of an index slice, unless the model says how many are prepared together.
        notice: takes lines about such batches, and about features that are read beside the shards.

    Raises:
        UserError: the split has no mentions, or one whose gold is not in the kb.
    """
    run, gold_row_M, model = evaluation.run, evaluation.gold_row_M, evaluation.model
    if fixed := model.matcher.fixed_batches():
        slice_rows = fixed.entities
        notice(
            f"{model.name}: {fixed.reason}; it ranks {fixed.mentions} mentions and {fixed.entities:,} entities at a "
            "time, as its release does"
        )
    plan = _plan(evaluation, slice_rows, notice)
    where = run.storage.location, run.dataset.location, evaluation.split, model.ranked_by
    return RankingFiles(*where, plan.name, plan.made_from, plan.slices, gold_row_M)
