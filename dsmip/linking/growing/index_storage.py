"""The numbers of a bundle's index as they are stored: float32, float16, or int8 with one scale for each row.

They are read as float32. What is read and stored again is the same: rows that are equal stay equal, and ties stay ties.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmip.data.table import Column, Ragged, Repeated, Table
from dsmip.linking.bundle import IndexDtype

_SCALE = "#scale"
_LARGEST = 127


def stored_as(table: Table, dtype: IndexDtype) -> Table:
    """Prepared entities float32 as an index of a bundle holds them.

    >>> rows = Table({"vector": torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.0, 0.0]])})
    >>> stored_as(rows, "int8").dense("vector")
    tensor([[  0,  32, 127],
            [  0,   0,   0]], dtype=torch.int8)
    >>> restored(stored_as(rows, "int8")).dense("vector")
    tensor([[0.0000, 0.5039, 2.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    if dtype != "int8":
        return table.cast(getattr(torch, dtype))
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        values = column if isinstance(column, Tensor) else column.values
        if not values.is_floating_point() or values.ndim < 2:
            columns[name] = column
            continue
        columns[name + _SCALE] = _mapped(column, _scale)
        columns[name] = _mapped(column, lambda rows: (rows / _scale(rows)).round().to(torch.int8))
    return Table(columns)


def restored(table: Table) -> Table:
    """Prepared entities float32 of what `stored_as` has made."""
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        if name.endswith(_SCALE):
            continue
        scale = table.columns.get(name + _SCALE)
        if scale is None:
            columns[name] = column
            continue
        of_rows = scale if isinstance(scale, Tensor) else scale.values
        columns[name] = _mapped(column, lambda rows, of_rows=of_rows: rows.float() * of_rows)  # type: ignore[misc]
    return Table(columns).cast(torch.float32)


def _scale(values: Tensor) -> Tensor:
    """float32 [R, ..., 1]: what one step of a row stands for; rows of zeros have 1."""
    scale = values.float().abs().amax(dim=-1, keepdim=True) / _LARGEST
    return scale.where(scale > 0, 1.0)


def _mapped(column: Column, transform: Callable[[Tensor], Tensor]) -> Column:
    """The same items with other numbers; rows that items share stay shared."""
    if isinstance(column, Ragged):
        return Ragged(transform(column.values), column.starts, column.lengths)
    if isinstance(column, Repeated):
        return Repeated(transform(column.values), column.index)
    return transform(column)
