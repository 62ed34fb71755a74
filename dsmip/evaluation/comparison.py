"""Two evaluations of the same mentions side by side: is one better than the other, or was it luck?"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsmip.errors import UserError
from dsmip.evaluation.groups import AMBIGUITY, REPORTED, rows_by_value
from dsmip.evaluation.metrics import Difference, compare_counts, summarise
from dsmip.evaluation.report import KB_HASH, RANKS, evaluation_name
from dsmip.ops.ranking import Counts
from dsmip.runs.load_config import load_config
from dsmip.runs.loaded_model import CONFIG, evaluated_names
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.run_storage import STAMP, RunStorage

_COLUMNS = ["mention_id", "gold", "better", "tied", *REPORTED]
_NAMED_AT_MOST = 3
_OLD_AMBIGUITY = "word"  # the column's name before it held the mention's word


@dataclass(frozen=True)
class Evaluation:
    """The ranks of one model on one split, by mention; mentions with the same id are told apart by their order.

    Attributes:
        records: The mention's row of ranks.parquet by (mention_id, number among its equals).
    """

    run: RunStorage
    model: str
    kb_hash: bytes
    records: Mapping[tuple[str, int], Mapping[str, Any]]

    def __str__(self) -> str:
        return f"{self.run} ({self.model})"


@dataclass(frozen=True)
class Comparison:
    """Differences by metric (second minus first), and hits@1 of both by group and value."""

    num_mentions: int
    metrics: dict[str, Difference]
    groups: dict[str, dict[str, dict[str, Any]]]


def read_evaluation(location: Location, split: str, model: str | None) -> Evaluation:
    """What `dsmip evaluate` wrote of a model (None: the one it takes by default). The run's data need not be there.

    Raises:
        UserError: No such run, model or evaluation, or its file is damaged or of an older version.
    """
    run = open_run_storage(location)
    run.refresh()
    if not (run.folder / STAMP).is_file():
        raise UserError(f"no run at {run} (no {STAMP}); 'dsmip train' makes one")
    names = evaluated_names(load_config(str(run.folder / CONFIG)))
    model = names[0] if model is None else model
    if model not in names:
        raise UserError(f"unknown model '{model}'; run {run} has {', '.join(names)}")
    ranks = f"{evaluation_name(split, model)}/{RANKS}"
    run.pull(ranks)
    path = run.folder / ranks
    command = f"dsmip evaluate --run {shlex.quote(str(run))} --split {split} --model {shlex.quote(model)}"
    if not path.is_file():
        raise UserError(f"run {run} has no evaluation of '{model}' on {split}; make it: {command}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: the file is damaged; make it again: {command}") from error
    metadata = table.schema.metadata or {}
    if AMBIGUITY not in table.column_names:
        table = table.rename_columns([AMBIGUITY if name == _OLD_AMBIGUITY else name for name in table.column_names])
    if KB_HASH not in metadata or not {*_COLUMNS} <= {*table.column_names}:
        raise UserError(f"{path} was written by an older version; make it again: {command}")
    seen: Counter[str] = Counter()
    records = {}
    for record in table.select(_COLUMNS).to_pylist():
        mention_id = record["mention_id"]
        records[mention_id, seen[mention_id]] = record
        seen[mention_id] += 1
    return Evaluation(run, model, metadata[KB_HASH], records)


def compare(first: Evaluation, second: Evaluation, generator: torch.Generator) -> Comparison:
    """Compares two evaluations mention by mention; groups are those of the first.

    Raises:
        UserError: They differ in kb, mentions or golds.
    """
    _check_same_task(first, second)
    keys = sorted(first.records)
    counts = [_counts(each, keys) for each in (first, second)]
    groups = [{name: first.records[key][name] or "" for name in REPORTED} for key in keys]
    by_group = {}
    for name in (name for name in REPORTED if any(each[name] for each in groups)):
        by_group[name] = {
            value: {"mentions": sum(rows), "hits@1": [_hits_at_1(each, rows) for each in counts]}
            for value, rows in rows_by_value(groups, name).items()
        }
    return Comparison(len(keys), compare_counts(counts[0], counts[1], generator), by_group)


def _check_same_task(first: Evaluation, second: Evaluation) -> None:
    if first.kb_hash != second.kb_hash:
        raise UserError(f"{first} and {second} ranked different knowledge bases; compare runs on the same data")
    only_first = first.records.keys() - second.records.keys()
    only_second = second.records.keys() - first.records.keys()
    if only_first or only_second:
        raise UserError(
            f"different mentions: {_named(only_first)} only in {first}, {_named(only_second)} only in {second}; "
            "compare runs on the same data"
        )
    for key, record in first.records.items():
        golds = record["gold"], second.records[key]["gold"]
        if golds[0] != golds[1]:
            raise UserError(
                f"different golds: mention '{key[0]}' is {golds[0]} in {first} and {golds[1]} in {second}; "
                "compare runs on the same data"
            )


def _named(keys: set[tuple[str, int]]) -> str:
    names = [f"'{mention_id}'" for mention_id, _ in sorted(keys)]
    more = ["..."] if len(names) > _NAMED_AT_MOST else []
    return f"{len(names)} ({', '.join(names[:_NAMED_AT_MOST] + more)})" if names else "0"


def _counts(evaluation: Evaluation, keys: Sequence[tuple[str, int]]) -> Counts:
    records = [evaluation.records[key] for key in keys]
    return Counts(torch.tensor([each["better"] for each in records]), torch.tensor([each["tied"] for each in records]))


def _hits_at_1(counts: Counts, rows: Sequence[bool]) -> float:
    rows_M = torch.tensor(rows)
    return summarise(Counts(counts.better_M[rows_M], counts.tied_M[rows_M]))["hits@1"]
