"""Bytes on disk of what a run will write: feature tables, an index, weights and checkpoints.

A table's bytes are linear in its items and in those that have a picture, so a table of some of the items tells those of
any number. Of columns with a fixed number of numbers per item it tells them exactly, of texts' tokens as well as the
sample stands for the rest. Headers of files are left out: a few hundred bytes of a table, a tenth of a kilobyte of each
tensor of weights.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from dsmip.data.table import Column, Ragged, Table
from dsmip.encoders.feature_cache import whole_features
from dsmip.evaluation.index import SLICE_ROWS
from dsmip.runs.checkpoints import KEPT
from dsmip.runs.weights import own_weights
from dsmip.training.trainer import trained_state
from dsmip.units.matcher import Part

_PLACE, _INDEX = 8, 4  # bytes of a token row's start or length, and of a repeated row's number


@dataclass(frozen=True, slots=True)
class TableBytes:
    """Bytes of a table, by what they grow with.

    Attributes:
        item, pictured: Of each item, and of each that has a picture.
        shared: Of the rows that all items without a picture share.
        numbered: Of each item, where some item has no picture: its row's number.
    """

    item: float = 0.0
    pictured: float = 0.0
    shared: float = 0.0
    numbered: float = 0.0

    def __add__(self, other: "TableBytes") -> "TableBytes":
        return TableBytes(
            self.item + other.item,
            self.pictured + other.pictured,
            self.shared + other.shared,
            self.numbered + other.numbered,
        )

    def of(self, items: int, pictured: int, tables: int = 1) -> int:
        """Of some items, of which `pictured` have a picture, in so many tables that share nothing."""
        size = self.item * items + self.pictured * pictured
        if pictured < items:
            size += self.shared * tables + self.numbered * items
        return ceil(size)

    def of_index(self, items: int, pictured: int) -> int:
        """Of an entity index, which lies in slices."""
        return self.of(items, pictured, ceil(items / SLICE_ROWS))


def table_bytes(table: Table, image_columns: Collection[str], has_image_N: Tensor, *, file: bool) -> TableBytes:
    """What a table of all items will take, from one of some items.

    Args:
        table: Of N items, features or prepared, in the precision in which they are stored.
        image_columns: Those that depend on the picture alone, of which items without one share a row.
        has_image_N: bool.
        file: Whether it is one of the feature cache, where only token rows are shared.
    """
    total = TableBytes()
    for name, column in table.columns.items():
        shared = name in image_columns and (not file or isinstance(column, Ragged))
        total += _column_bytes(column, has_image_N, shared=shared)
    return total


def _column_bytes(column: Column, has_image_N: Tensor, *, shared: bool) -> TableBytes:
    if isinstance(column, Ragged):
        row = _row_bytes(column.values)
        lengths_N = column.lengths.cpu()
        if not shared:
            return TableBytes(item=row * float(lengths_N.double().mean()) + 2 * _PLACE)
        with_image_N = has_image_N if bool(has_image_N.any()) else ~has_image_N
        tokens = row * float(lengths_N[with_image_N].double().mean())
        return TableBytes(item=2 * _PLACE, pictured=tokens, shared=tokens)
    row = _row_bytes(column if isinstance(column, Tensor) else column.values)
    return TableBytes(pictured=row, shared=row, numbered=_INDEX) if shared else TableBytes(item=row)


def _row_bytes(values: Tensor) -> int:
    return values[:1].numel() * values.element_size() if len(values) else 0


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of a part's tensors.

    Attributes:
        module: All that it has in memory, towers and all.
        trained: Parameters with a gradient.
        state: What training changes: those and buffers of its own.
        stored: Its weights in the run.
    """

    module: int
    trained: int
    state: int
    stored: int

    @property
    def checkpoint(self) -> int:
        """One checkpoint: weights, the best epoch's, and two moments of each trained number."""
        return 2 * self.state + 2 * self.trained

    @property
    def checkpoints(self) -> int:
        """All that are kept while it is trained, and until `dsmip clean`."""
        return KEPT * self.checkpoint

    @property
    def while_training(self) -> int:
        """In memory: the module, gradients, two moments and the best epoch's weights."""
        return self.module + 3 * self.trained + self.state


def part_bytes(part: Part) -> PartBytes:
    """Of a part on any device, `meta` too."""
    tensors = [*part.parameters(), *part.buffers()]
    trained = [each for each in part.parameters() if each.requires_grad]
    return PartBytes(
        module=_num_bytes(tensors),
        trained=_num_bytes(trained),
        state=_num_bytes(trained_state(part).values()),
        stored=_num_bytes(own_weights(part).values()),
    )


def module_bytes(module: nn.Module) -> int:
    """Of a module's tensors in memory."""
    return _num_bytes([*module.parameters(), *module.buffers()])


def _num_bytes(tensors: Collection[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def side_by_side(tables: dict[str, Table], gated: bool) -> Table:
    """Features of parts as a matcher reads them: of a gated whole under their names."""
    return whole_features(tables, list(tables)) if gated else next(iter(tables.values()))


def materialised(table: Table, rows: int) -> Table:
    """A table of so many rows, copies of these one after the other, which share nothing: for measurements."""
    index = torch.arange(rows) % len(table)
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        if isinstance(column, Ragged):
            chosen = column.rows(index)
            ends = chosen.lengths.cumsum(0)
            starts = ends - chosen.lengths
            offset = torch.repeat_interleave(chosen.starts - starts, chosen.lengths)
            values = column.values[torch.arange(int(ends[-1])) + offset]
            columns[name] = Ragged(values, starts, chosen.lengths)
        else:
            columns[name] = (column if isinstance(column, Tensor) else column.dense())[index]
    return Table(columns)
