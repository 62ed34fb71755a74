"""Evaluations of a run as `dsmip evaluate` has written them: figures, ranks, and the commands for what is missing."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsmip.errors import UserError
from dsmip.evaluation.groups import REPORTED
from dsmip.evaluation.stored.layout import METRICS_FILE, RANKS, UNKNOWN, evaluation_name
from dsmip.evaluation.stored.ranks import StoredRanks, read_ranks
from dsmip.messages import masked
from dsmip.ops.ranking import Counts
from dsmip.runs.load_config import load_config
from dsmip.runs.loaded_model import CONFIG, TrainedParts, evaluated_names
from dsmip.storage.locations import Location
from dsmip.storage.parsing import read_json

Key = tuple[str, int]
_COLUMNS = (
    "mention_id",
    "word",
    "sentence",
    "groups",
    "gold",
    "rank",
    "better",
    "tied",
    "top",
    "top_scores",
    *REPORTED,
)
_OF_CHOICES = ("gold_expert", "top_experts")


@dataclass(frozen=True)
class ModelEvaluation:
    """One model's metrics.json and ranks.parquet.

    Attributes:
        model: Its name.
        metrics: As they are stored.
        rows: Of ranks.parquet, by mention; mentions with one id are told apart by their order.
        schema: The columns that they have.
        unknown: Of unknown.parquet: mentions whose entity is not in the knowledge base.
    """

    model: str
    metrics: Mapping[str, Any]
    rows: Mapping[Key, Mapping[str, Any]]
    schema: tuple[str, ...]
    unknown: tuple[Mapping[str, Any], ...] = ()

    @property
    def has_choices(self) -> bool:
        """Whether an expert is known for each of the best entities."""
        return {*_OF_CHOICES} <= {*self.schema}

    def experts(self, order: Sequence[str]) -> list[str]:
        """Those that it chose from, in that order; none where it chooses none."""
        if not self.has_choices:
            return []
        usage = self.metrics.get("experts", {}).get("pair_share", {})
        return sorted(usage, key=lambda name: order.index(name) if name in order else len(order))

    def counts(self, keys: Sequence[Key]) -> Counts:
        """int64 [M] each, of these mentions."""
        rows = [self.rows[key] for key in keys]
        return Counts(torch.tensor([row["better"] for row in rows]), torch.tensor([row["tied"] for row in rows]))


@dataclass(frozen=True)
class EvaluatedRun:
    """A run and all that was evaluated of it on one split.

    Attributes:
        parts: Its trained parts, of which nothing is loaded.
        split: The split.
        shown: The model that the report is about.
        stored: What is evaluated, by model, the shown one among it.
        names: All that could be.
        experts: What the system chooses from; may be none.
    """

    parts: TrainedParts
    split: str
    shown: str
    stored: Mapping[str, ModelEvaluation]
    names: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def main(self) -> ModelEvaluation:
        """Of the shown model."""
        return self.stored[self.shown]

    @property
    def title(self) -> str:
        """The run's address, without secrets."""
        return masked(str(self.parts.storage))

    def expert_ranks(self) -> dict[str, ModelEvaluation]:
        """The experts' own rankings, where all of them are evaluated on the mentions of the shown model."""
        names = self.main.experts(self.experts) or self.experts
        found = {name: self.stored[name] for name in names if name in self.stored}
        same = all(each.rows.keys() == self.main.rows.keys() for each in found.values())
        return found if same and len(found) == len(names) else {}

    def command(self, *words: str) -> str:
        """A command on this run, to be typed."""
        return masked(shlex.join(["dsmip", words[0], "--run", str(self.parts.storage), *words[1:]]))

    def evaluate_command(self, model: str) -> str:
        """The command that makes or renews a model's evaluation."""
        return self.command("evaluate", "--split", self.split, "--model", model)


def read_evaluated_run(location: Location, split: str, model: str | None) -> EvaluatedRun:
    """Reads all evaluations of a run on a split; no data set and no weights are opened.

    Args:
        location: Where the run lies.
        split: The split.
        model: What the report is about (default: what `dsmip evaluate` takes by default).

    Raises:
        UserError: No such run, model or evaluation, or a damaged file.
    """
    main = read_ranks(location, split, model)
    main.check(_COLUMNS)
    storage = main.run
    config = load_config(str(storage.folder / CONFIG))
    parts, names = TrainedParts(storage, config), evaluated_names(config)
    stored = {}
    for name in names:
        if name == main.model:
            stored[name] = _evaluation(main)
        elif f"{evaluation_name(split, name)}/{RANKS}" in storage.glob(f"{evaluation_name(split, name)}/*"):
            other = read_ranks(storage, split, name)
            if {*_COLUMNS} <= {*other.table.column_names} and (other.path.parent / METRICS_FILE).is_file():
                stored[name] = _evaluation(other)
    return EvaluatedRun(parts, split, main.model, stored, names, parts.system.choices(config.system))


def _evaluation(ranks: StoredRanks) -> ModelEvaluation:
    """With the figures that were written beside the ranks."""
    path = ranks.path.parent / METRICS_FILE
    again = f"; make it again: {ranks.command}"
    if not path.is_file():
        raise UserError(f"{path} is missing{again}")
    metrics = read_json(path, _checked_metrics, again)
    if len(ranks.table) != metrics["mentions"]:
        raise UserError(f"{path} and {RANKS} are of different evaluations{again}")
    schema = tuple(name for name in (*_COLUMNS, *_OF_CHOICES) if name in ranks.table.column_names)
    rows = dict(zip(ranks.mention_keys(), ranks.table.select(schema).to_pylist(), strict=True))
    return ModelEvaluation(ranks.model, metrics, rows, schema, _unknown(ranks) if metrics.get("unknown") else ())


def _unknown(ranks: StoredRanks) -> tuple[Mapping[str, Any], ...]:
    path = ranks.path.parent / UNKNOWN
    ranks.run.pull(path.relative_to(ranks.run.folder).as_posix())
    try:
        return tuple(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is missing or damaged; make it again: {ranks.command}") from error


def _checked_metrics(metrics: Any) -> dict[str, Any]:
    overall = {str(name): float(value) for name, value in metrics["overall"].items()}
    sizes = {name: int(metrics[name]) for name in ("mentions", "entities")}
    return {**metrics, "overall": overall, "groups": dict(metrics["groups"]), **sizes}
