"""A check: one question about every mention, or every entity, which of them it is true of, and how many that are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.inspection.columns import Flags, Hashes, Ints
from data_prep.inspection.meanings import Meaning

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Check:
    """A question and its answer.

    Attributes:
        name: The key in JSON and in `meanings`.
        label: The words in tables.
        hits: Of which rows it is true.
        of: Which rows it is asked of; the others count nowhere.
        partner: By row, the other record that shows the fault: its row, or NOBODY.
        partner_kind: What that record is.
    """

    name: str
    label: str
    hits: Flags
    of: Flags
    partner: Ints | None = None
    partner_kind: Literal["mention", "entity"] = "mention"


@dataclass(frozen=True, slots=True)
class Count:
    """How many of how many."""

    count: int
    of: int

    @property
    def share(self) -> float | None:
        """Their quotient; None where the question is asked of nobody."""
        return self.count / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class Row:
    """A check's counts by split, or by "kb"; of nobody where it is not asked."""

    name: str
    label: str
    meaning: Meaning
    counts: Mapping[str, Count]


def groups_of(keys: Hashes | Ints) -> Ints:
    """Numbers of groups, 0 .. G - 1, that equal keys share."""
    return np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)


def first_of_group(groups: Ints, chosen: Flags, num_groups: int | None = None) -> Ints:
    """The first chosen row of each group, or NOBODY."""
    count = num_groups if num_groups is not None else int(groups.max(initial=-1)) + 1
    first = np.full(count, NOBODY, np.int64)
    rows = np.flatnonzero(chosen)[::-1]
    first[groups[rows]] = rows
    return first


def other_of_group(groups: Ints, chosen: Flags) -> Ints:
    """Another chosen row of each row's group, or NOBODY."""
    rows = np.arange(len(groups))
    first = first_of_group(groups, chosen)[groups] if len(groups) else rows
    last = np.full(int(groups.max(initial=-1)) + 1, NOBODY, np.int64)
    picked = np.flatnonzero(chosen)
    last[groups[picked]] = picked
    return np.where(first != rows, first, np.where(last[groups] != rows, last[groups], NOBODY)).astype(np.int64)


def combine(*keys: NDArray[Any]) -> Ints:
    """One key of several columns, equal where all of them are."""
    groups = groups_of(keys[0])
    for key in keys[1:]:
        other = groups_of(key)
        groups = groups_of(groups * (int(other.max(initial=0)) + 1) + other)
    return groups
