"""Preparation of a split's mentions or of the kb: all that a pair needs of an item, computed once.

Entities without a picture are alike in all that depends on the picture alone: it is prepared once and stored once.
Prepared in a matrix product with others, equal rows differ in their last bits from call to call, and entities that
should tie would be ranked by rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.table import Column, Ragged, Repeated, Rows, Table, concatenate
from dsmip.encoders.feature_cache import BATCH_SIZE, whole_features
from dsmip.parallel import map_alone
from dsmip.progress import CountRows, Progress, no_progress
from dsmip.runs.part_features import PartFeatures, rows_of
from dsmip.units.matcher import Matcher

HAS_IMAGE = "entity_has_image"  # beside the features of any encoder, which may have a `has_image` of their own
TILE = 512  # rows; two batches of the encoders


@torch.no_grad()
def prepare_in_tiles(matcher: Matcher, features: Table, side: str, device: torch.device, tile: int = 512) -> Table:
    """`prepare_mentions` or `prepare_entities` (side: "mentions" | "entities") of a whole features table, by rows."""
    matcher.eval()
    prepare = matcher.prepare_mentions if side == "mentions" else matcher.prepare_entities
    starts = range(0, len(features), tile)
    return concatenate([prepare(features.take(slice(s, s + tile)).to(device).single()) for s in starts])


@torch.no_grad()
def prepare_batches(
    batches: Iterable[ItemBatch],
    split: str,
    matcher: Matcher,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> Table:
    """Encodes and prepares batches (at least one) of a split's mentions, or of entities (split "kb").

    Features are never held as a whole.
    """
    if split == KB:
        encode, prepare = matcher.encode_entities, matcher.prepare_entities
    else:
        encode, prepare = matcher.encode_mentions, matcher.prepare_mentions
    matcher.eval()
    prepared = []
    for batch in batches:
        prepared.append(prepare(encode(batch.to(device))))
        after_batch()
    return concatenate(prepared)


def entities_with_image(dataset: Dataset) -> Tensor:
    """bool [E]: entities of the kb that have a picture."""
    return torch.tensor(dataset.entity_texts().column("num_images").to_numpy() > 0)


def with_has_image(kb: Table, dataset: Dataset) -> Table:
    """Features of the whole kb with the column `HAS_IMAGE` (bool [E]), by which `prepare_entities` goes."""
    assert HAS_IMAGE not in kb.columns
    has_image_E = entities_with_image(dataset)
    for column in kb.columns.values():  # a training may have moved them to its GPU
        has_image_E = has_image_E.to(column.device if isinstance(column, Tensor) else column.values.device)
    return kb.merged(Table({HAS_IMAGE: has_image_E}))


@torch.no_grad()
def prepare_entities(matcher: Matcher, kb: Table, rows: Sequence[int], device: torch.device) -> Table:
    """`prepare_in_tiles` of some rows of the kb's features, with `sharing_image`.

    Args:
        matcher: on the device.
        kb: features `with_has_image`.
        rows: of the kb, at least one.
        device: where they are prepared.
    """
    features = Table({name: column for name, column in kb.columns.items() if name != HAS_IMAGE})
    prepared = prepare_in_tiles(matcher, features.rows(_indices(rows)), "entities", device)
    lacking_E = ~kb.dense(HAS_IMAGE)

    def alone(row: int) -> Table:
        return prepare_in_tiles(matcher, features.rows(slice(row, row + 1)), "entities", device)

    return sharing_image(matcher, prepared, rows, lacking_E, alone)


def sharing_image(
    matcher: Matcher, prepared: Table, rows: Sequence[int], lacking_E: Tensor, alone: Callable[[int], Table]
) -> Table:
    """Prepared entities of which all without a picture share one row of what depends on the picture alone.

    That row is of the kb's first such entity, prepared in a call of its own: slices of the kb have the same numbers.

    Args:
        matcher: it says which columns these are (`Matcher.image_columns`).
        prepared: entities of `rows`.
        rows: of the kb.
        lacking_E: bool [E], which entities of the kb have no picture.
        alone: prepares one kb row in a call of its own; asked only where the row is needed.
    """
    columns, lacking_N = matcher.image_columns(prepared), lacking_E[_indices(rows)]
    if not (columns and bool(lacking_N.any())):
        return prepared
    alike = alone(int(lacking_E.nonzero()[0]))
    first = alike.columns[columns[0]]
    lacking_N = lacking_N.to((first if isinstance(first, Tensor) else first.values).device)
    num_own = int((~lacking_N).sum())
    index_N = ((~lacking_N).cumsum(0) - 1).where(~lacking_N, num_own).int()
    shared: dict[str, Column] = {}
    for name in columns:
        own = prepared.columns[name]
        if isinstance(own, Ragged):
            shared[name] = own.sharing(lacking_N, alike.ragged(name))
        else:
            values = torch.cat([prepared.dense(name)[~lacking_N], alike.dense(name)])
            shared[name] = Repeated(values, index_N)
    return prepared.merged(Table(shared))


def _indices(rows: Sequence[int]) -> Rows:
    """A slice where rows are a range: nothing is copied."""
    return slice(rows.start, rows.stop) if isinstance(rows, range) else torch.tensor(rows, dtype=torch.int64)


def _tiles(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Preparer:
    """Prepares the items of a data set on one device; an encoder is loaded when it is first needed."""

    def __init__(
        self,
        matcher: Matcher,
        features: Mapping[str, PartFeatures],
        dataset: Dataset,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> None:
        """
        Args:
            matcher: it moves to the device.
            features: what it reads, by part.
            dataset: the items'.
            device: where items are encoded and prepared.
            progress: of features that are encoded for the run's cache.
        """
        self._device, self._progress, self._dataset = device, progress, dataset
        self._matcher, self._features = matcher.to(device), features
        self._sources: dict[str, Callable[[range], Table]] = {}
        self._alone = cache(self._prepared_alone)  # all slices share one row

    def entities(self, rows: range, count_rows: CountRows) -> Table:
        """Prepared entities of these kb rows."""
        if not self._sources:
            self._sources = {part: features.kb_rows(self._device) for part, features in self._features.items()}
        prepared = self._prepared(rows, "entities", self._sources, count_rows)
        if self._matcher.fixed_batches():  # a missing picture becomes something else in every batch
            return prepared
        return sharing_image(self._matcher, prepared, rows, self._lacking_E, self._alone)

    @cached_property
    def _lacking_E(self) -> Tensor:
        """bool [E]: entities without a picture."""
        return ~entities_with_image(self._dataset)

    def _prepared_alone(self, row: int) -> Table:
        """An entity, encoded in its batch, prepared in a call of its own."""
        start = row - row % BATCH_SIZE
        batch = range(start, min(start + BATCH_SIZE, len(self._lacking_E)))
        sources = {
            part: lambda rows, source=source: source(batch).take(slice(row - start, row - start + 1))
            for part, source in self._sources.items()
        }
        return self._prepared(range(row, row + 1), "entities", sources, lambda count: None)

    def _prepared(
        self, rows: range, side: str, sources: Mapping[str, Callable[[range], Table]], count_rows: CountRows
    ) -> Table:
        """Prepared items of these rows, tile by tile; `sources` give each part's features of some rows."""

        def features(tile: range) -> Table:
            tables = {part: source(tile) for part, source in sources.items()}
            return whole_features(tables, list(tables)) if len(tables) > 1 else next(iter(tables.values()))

        def prepare(table: Table) -> Table:
            return prepare_in_tiles(self._matcher, table, side, self._device, tile=len(table))

        def counted(tables: Iterator[Table]) -> Iterator[Table]:
            for table in tables:
                count_rows(len(table))
                yield table

        if (fixed := self._matcher.fixed_batches()) is None:
            each = map_alone(lambda tile: prepare(features(tile)), _tiles(rows, TILE), self._device)
            return concatenate(list(counted(each)))
        size, together = fixed.mentions if side == "mentions" else fixed.entities, []
        for batch in _tiles(rows, size):
            whole = concatenate(list(counted(map_alone(features, _tiles(batch, TILE), self._device))))
            together.append(prepare(whole))
        return concatenate(together)

    def mentions(self, split: str, count_rows: CountRows) -> Table:
        """A split's prepared mentions. Their features go to the run's cache: several models read them."""
        sources = {
            part: rows_of(features.table(split, self._device, self._progress))
            for part, features in self._features.items()
        }
        return self._prepared(range(self._dataset.num_mentions(split)), "mentions", sources, count_rows)
