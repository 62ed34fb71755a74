"""The ranks that an evaluation has stored, read again without the run's data."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dsmip.errors import UserError
from dsmip.evaluation.groups import AMBIGUITY
from dsmip.evaluation.stored.layout import RANKS, evaluation_name
from dsmip.runs.load_config import load_config
from dsmip.runs.loaded_model import CONFIG, evaluated_names
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.run_storage import STAMP, RunStorage

_OLD_AMBIGUITY = "word"  # the column's name before it held the mention's word


@dataclass(frozen=True)
class StoredRanks:
    """What `dsmip evaluate` wrote of a model: ranks.parquet.

    Attributes:
        path: The file.
        command: What makes it again.
    """

    run: RunStorage
    model: str
    path: Path
    command: str
    table: pa.Table

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        return self.table.schema.metadata or {}

    def mention_keys(self) -> list[tuple[str, int]]:
        """Of each row its mention's id, and its number among those of the same id."""
        seen: Counter[str] = Counter()
        found = []
        for mention_id in self.table["mention_id"].to_pylist():
            found.append((mention_id, seen[mention_id]))
            seen[mention_id] += 1
        return found

    def check(self, columns: Sequence[str], metadata: Sequence[bytes] = ()) -> None:
        """Sees that columns, and keys of the metadata, are there.

        Raises:
            UserError: An older version has written the file.
        """
        if not ({*columns} <= {*self.table.column_names} and {*metadata} <= {*self.metadata}):
            raise UserError(f"{self.path} was written by an older version; make it again: {self.command}")


def read_ranks(location: Location, split: str, model: str | None) -> StoredRanks:
    """What `dsmip evaluate` wrote of a model (None: the one it takes by default). The run's data need not be there.

    Raises:
        UserError: No such run, model or evaluation, or its file is damaged.
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
    if AMBIGUITY not in table.column_names:
        renamed = [AMBIGUITY if name == _OLD_AMBIGUITY else name for name in table.column_names]
        table = table.rename_columns(renamed).replace_schema_metadata(table.schema.metadata)
    return StoredRanks(run, model, path, command, table)
