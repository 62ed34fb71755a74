"""Entities without a picture are alike in all that depends on the picture alone: it is prepared once and stored once.

Prepared in a matrix product with others, equal rows differ in their last bits from call to call, and entities that
should tie would be ranked by rounding.
"""

import torch
from torch import Tensor

from dsmip.evaluation import prepare_in_tiles
from dsmip.matcher import Matcher
from dsmip.table import Ragged, Repeated, Table


@torch.no_grad()
def prepare_entities(matcher: Matcher, kb: Table, rows: range, device: torch.device) -> Table:
    """`prepare_in_tiles` of some rows of the kb's features; picture columns of all entities without one share a row.

    That row is prepared from the kb's first such entity in a call of its own: slices of the kb have the same numbers.
    """
    prepared = prepare_in_tiles(matcher, kb.rows(slice(rows.start, rows.stop)), "entities", device)
    lacking_E = without_picture(kb)
    lacking_N = lacking_E[rows.start : rows.stop]
    if not bool(lacking_N.any()):
        return prepared
    alike = matcher.prepare_entities(kb.take(lacking_E.nonzero()[:1, 0]).to(device))
    return share_picture(prepared, alike, lacking_N.to(device))


def share_picture(prepared: Table, alike: Table, lacking_N: Tensor) -> Table:
    """Prepared entities whose picture columns (see `Matcher.prepare_entities`) are those of `alike`, stored once, where
    `lacking_N` (bool [N]).

    alike: one entity without a picture, prepared in a call of its own.
    """
    num_own = int((~lacking_N).sum())
    index_N = ((~lacking_N).cumsum(0) - 1).where(~lacking_N, num_own).int()
    shared = {
        name: Repeated(torch.cat([prepared.dense(name)[~lacking_N], alike.dense(name)]), index_N)
        for name in picture_columns(prepared)
    }
    return Table({**prepared.columns, **shared})


def picture_columns(prepared: Table) -> list[str]:
    """The dense columns of prepared entities that depend on the picture alone."""
    return [
        name for name, column in prepared.columns.items() if "image" in name.split(".") and isinstance(column, Tensor)
    ]


def without_picture(features: Table) -> Tensor:
    """bool [N]: items that share the token rows of their picture, as the feature cache stores a missing one's."""
    for name, column in features.columns.items():
        if name.split(".")[-1] == "image_tokens" and isinstance(column, Ragged) and len(column.starts):
            starts, num_items = column.starts.unique(return_counts=True)
            most = int(num_items.argmax())
            return column.starts == starts[most] if num_items[most] > 1 else torch.zeros(len(features)).bool()
    return torch.zeros(len(features)).bool()
