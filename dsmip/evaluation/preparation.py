"""Preparation of a split's mentions or of the kb: all that a pair needs of an item, computed once.

Entities without a picture are alike in all that depends on the picture alone: it is prepared once and stored once.
Prepared in a matrix product with others, equal rows differ in their last bits from call to call, and entities that
should tie would be ranked by rounding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsmip.data.collate import Collator
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Repeated, Table, concatenate
from dsmip.encoders.feature_cache import item_batches
from dsmip.units.matcher import Matcher

HAS_IMAGE = "has_image"


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


def entities_with_image(dataset: Dataset) -> Tensor:
    """bool [E]: entities of the kb that have a picture."""
    return torch.tensor(dataset.entity_texts().column("num_images").to_numpy() > 0)


def with_has_image(kb: Table, dataset: Dataset) -> Table:
    """Features of the whole kb with the column `has_image` (bool [E]), which `prepare_entities` reads and keeps."""
    has_image_E = entities_with_image(dataset)
    for column in kb.columns.values():  # a training may have moved them to its GPU
        has_image_E = has_image_E.to(column.device if isinstance(column, Tensor) else column.values.device)
    return kb.merged(Table({HAS_IMAGE: has_image_E}))


@torch.no_grad()
def prepare_entities(matcher: Matcher, kb: Table, rows: range, device: torch.device) -> Table:
    """`prepare_in_tiles` of some rows of the kb's features; all entities without a picture share its columns' row.

    That row is prepared from the kb's first such entity in a call of its own: slices of the kb have the same numbers.

    Args:
        matcher: on the device.
        kb: features `with_has_image`.
        rows: of the kb.
        device: where they are prepared.
    """
    prepared = prepare_in_tiles(matcher, kb.rows(slice(rows.start, rows.stop)), "entities", device)
    has_image_E = kb.dense(HAS_IMAGE)
    has_image_N = has_image_E[rows.start : rows.stop]
    if not bool(has_image_N.all()):
        first = (~has_image_E).nonzero()[:1, 0]
        alike = matcher.prepare_entities(kb.take(first).to(device))
        prepared = share_image(prepared, alike, ~has_image_N.to(device), matcher.image_columns(prepared))
    return prepared.merged(Table({HAS_IMAGE: has_image_N.to(device)}))


def share_image(prepared: Table, alike: Table, lacking_N: Tensor, columns: Sequence[str]) -> Table:
    """Prepared entities whose `columns` are those of `alike`, stored once, where they lack a picture.

    Args:
        prepared: N entities.
        alike: one entity without a picture, prepared in a call of its own.
        lacking_N: bool [N], which have none.
        columns: that depend on the picture alone (`Matcher.image_columns`).
    """
    num_own = int((~lacking_N).sum())
    index_N = ((~lacking_N).cumsum(0) - 1).where(~lacking_N, num_own).int()
    shared = {
        name: Repeated(torch.cat([prepared.dense(name)[~lacking_N], alike.dense(name)]), index_N) for name in columns
    }
    return prepared.merged(Table(shared))
