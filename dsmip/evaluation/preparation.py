"""Preparation of a split's mentions or of the kb: all that a pair needs of an item, computed once.

Entities without a picture are alike in all that depends on the picture alone: it is prepared once and stored once.
Prepared in a matrix product with others, equal rows differ in their last bits from call to call, and entities that
should tie would be ranked by rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmip.data.collate import Collator
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Ragged, Repeated, Table, concatenate
from dsmip.encoders.feature_cache import item_batches
from dsmip.units.matcher import Matcher


@torch.no_grad()
def prepare_in_tiles(matcher: Matcher, features: Table, side: str, device: torch.device, tile: int = 512) -> Table:
    """`prepare_mentions` or `prepare_entities` (side: "mentions" | "entities") of a whole features table, by rows."""
    matcher.eval()
    prepare = matcher.prepare_mentions if side == "mentions" else matcher.prepare_entities
    starts = range(0, len(features), tile)
    return concatenate([prepare(features.take(slice(s, s + tile)).to(device)) for s in starts])


@torch.no_grad()
def prepare_split(
    split: str,
    matcher: Matcher,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    rows: range | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Table:
    """Encodes and prepares a split (or `rows` of the kb) batch by batch: features are never held as a whole."""
    if split == KB:
        encode, prepare = matcher.encode_entities, matcher.prepare_entities
    else:
        encode, prepare = matcher.encode_mentions, matcher.prepare_mentions
    matcher.eval()
    prepared = []
    for batch in item_batches(split, dataset, collator, rows):
        prepared.append(prepare(encode(batch.to(device))))
        after_batch()
    return concatenate(prepared)


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
