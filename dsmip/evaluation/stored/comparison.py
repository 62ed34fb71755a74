"""Two systems on the same mentions side by side, one seed or several: is one better, or was it luck?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from dsmip.errors import UserError
from dsmip.evaluation.groups import REPORTED, rows_by_value, stored_groups
from dsmip.evaluation.metrics import METRICS, Difference, compare_counts
from dsmip.evaluation.stored.layout import KB_HASH, PROTOCOL
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.evaluation.stored.ranks import read_ranks
from dsmip.ops.ranking import Counts
from dsmip.storage.locations import Location
from dsmip.storage.run_storage import RunStorage

_COLUMNS = ["mention_id", "gold", "better", "tied", *REPORTED]
_OWN_GROUPS = "groups"  # a column that older versions did not write
_NAMED_AT_MOST = 3
_OF_GROUPS = {"hits@1": METRICS["hits@1"]}


@dataclass(frozen=True)
class Evaluation:
    """The ranks of one model on one split, by mention; mentions with the same id are told apart by their order.

    Attributes:
        protocol: None where an older version has written the ranks.
        records: The mention's row of ranks.parquet by (mention_id, number among its equals).
    """

    run: RunStorage
    model: str
    kb_hash: bytes
    protocol: EvaluationProtocol | None
    records: Mapping[tuple[str, int], Mapping[str, Any]]

    def __str__(self) -> str:
        return f"{self.run} ({self.model})"


@dataclass(frozen=True)
class Comparison:
    """Differences by metric (second minus first); hits@1 of both, and the difference's interval, by group and value."""

    num_mentions: int
    metrics: dict[str, Difference]
    groups: dict[str, dict[str, dict[str, Any]]]


def read_evaluation(location: Location, split: str, model: str | None) -> Evaluation:
    """The ranks of a model, as they are compared.

    Raises:
        UserError: As of `read_ranks`, or its file is of an older version.
    """
    stored = read_ranks(location, split, model)
    stored.check(_COLUMNS, [KB_HASH])
    columns = [*_COLUMNS, *({_OWN_GROUPS} & {*stored.table.column_names})]
    records = dict(zip(stored.mention_keys(), stored.table.select(columns).to_pylist(), strict=True))
    protocol = EvaluationProtocol.read(stored.metadata.get(PROTOCOL))
    return Evaluation(stored.run, stored.model, stored.metadata[KB_HASH], protocol, records)


def compare(
    firsts: Sequence[Evaluation], seconds: Sequence[Evaluation], generator: torch.Generator, *, across: bool = False
) -> Comparison:
    """Compares two systems mention by mention; groups are those of the first's first evaluation.

    Args:
        firsts, seconds: A system's evaluations, one for each of its seeds.
        generator: Of the resamples and sign flips.
        across: Also where their protocols differ; mentions and golds must be the same all the same.

    Raises:
        UserError: They differ in mentions or golds, or, not `across`, in their protocols.
    """
    everyone = [*firsts, *seconds]
    for one, other in () if across else combinations(everyone, 2):
        if found := protocol_differences(one, other):
            raise UserError(
                f"{one} and {other} were not evaluated alike: {'; '.join(found)}; compare runs on the same data, or "
                "take --across if that is what you compare"
            )
    first = everyone[0]
    for other in everyone[1:]:
        _check_same_mentions(first, other)
    keys = sorted(first.records)
    counts = _counts(firsts, keys), _counts(seconds, keys)
    groups = [stored_groups(first.records[key]) for key in keys]
    differences = compare_counts(*counts, generator)
    by_group = {}
    for name in sorted({name for each in groups for name in each}):
        by_group[name] = {
            value: {"mentions": sum(rows), **_group(counts, rows, generator)}
            for value, rows in rows_by_value(groups, name).items()
        }
    return Comparison(len(keys), differences, by_group)


def unlike(evaluations: Sequence[Evaluation]) -> list[str]:
    """What was not alike in any two evaluations, besides their mentions, in words."""
    return sorted({each for pair in combinations(evaluations, 2) for each in protocol_differences(*pair)})


def protocol_differences(first: Evaluation, second: Evaluation) -> list[str]:
    """What keeps two evaluations from being compared, besides their mentions, in words."""
    if first.protocol is not None and second.protocol is not None:
        return first.protocol.differences(second.protocol)
    return ["they ranked different knowledge bases"] if first.kb_hash != second.kb_hash else []


def _check_same_mentions(first: Evaluation, second: Evaluation) -> None:
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


def _counts(evaluations: Sequence[Evaluation], keys: Sequence[tuple[str, int]]) -> Counts:
    """int64 [S, M] of a system's seeds."""
    records = [[each.records[key] for key in keys] for each in evaluations]
    better, tied = ([[record[name] for record in row] for row in records] for name in ("better", "tied"))
    return Counts(torch.tensor(better), torch.tensor(tied))


def _group(counts: tuple[Counts, Counts], rows: Sequence[bool], generator: torch.Generator) -> dict[str, Any]:
    """hits@1 of both on some mentions, and the interval of their difference."""
    rows_M = torch.tensor(rows)
    first, second = (Counts(each.better_M[:, rows_M], each.tied_M[:, rows_M]) for each in counts)
    found = compare_counts(first, second, generator, metrics=_OF_GROUPS)["hits@1"]
    return {"hits@1": [found.first, found.second], "interval": found.interval}
