"""The feature cache: what an encoder says of every item, computed once per split, memory-mapped by all readers.

A table's name carries the hash of everything that its content depends on (weights, data, texts, precision), so a stale
one is never read and a finished one is never computed again.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.records import Entity
from dsmip.data.table import Table, concatenate
from dsmip.data.table_writer import TableWriter
from dsmip.encoders.base import FeatureEncoder, Side
from dsmip.encoders.feature_keys import content_key, content_of, feature_key
from dsmip.encoders.shared_tables.places import address_of, open_address
from dsmip.encoders.shared_tables.tables import Origin, Say, SharedTables
from dsmip.messages import on_stderr
from dsmip.parallel import map_ahead, map_alone
from dsmip.progress import CountRows
from dsmip.storage.locations import Location, open_run_storage

Item = TypeVar("Item")
BATCH_SIZE = 256  # rows that an encoder takes at once
_LEAST_READERS, _MOST_READERS = 2, 8


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class FeatureCache:
    """Feature tables of a run: those of encoders that train its own, frozen ones' shared with other runs.

    Its own are `<part>-<split>-<hash>.safetensors`; of a run in a store, nodes take one another's.

    Args:
        location: Of its own tables.
        dtype: In which features are kept.
        places: Where shared tables are looked for.
        new: Gives the place of new ones; None: the run keeps them.
    """

    def __init__(
        self,
        location: Location,
        dtype: torch.dtype = torch.float32,
        places: Sequence[SharedTables] = (),
        new: Callable[[], SharedTables | None] = lambda: None,
    ) -> None:
        self.storage, self.dtype = open_run_storage(location), dtype
        self._places, self._new = places, new

    def table(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        count_rows: CountRows = lambda count: None,
        say: Say = on_stderr,
    ) -> Table:
        """Features of a split's mentions (in shard order) or of the kb (split "kb", in row order)."""
        path = self.ensure(part, split, encoder, dataset, collator, device, count_rows, say)
        return load_features([path], dataset.kept.get(split))

    def ensure(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        count_rows: CountRows = lambda count: None,
        say: Say = on_stderr,
    ) -> Path:
        """The file of those features, computed unless it is there. Of a view it may hold those of the whole split.

        Args:
            count_rows: Also called, with 0, while another process computes them.
            say: Told of damaged ones.
        """
        found = self.find(part, split, encoder, dataset, collator, say)
        if found is not None:
            return found

        def write(path: Path) -> int:
            encode_split(path, split, encoder, dataset, collator, device, self.dtype, count_rows)
            return dataset.num_entities if split == KB else dataset.num_mentions(split)

        keys = self._keys(split, encoder, dataset, collator)
        if keys and (place := self._new()) is not None:
            origin = Origin(data=dataset.manifest.name, split=split, part=part)
            return place.made(keys[-1], origin, write, lambda: count_rows(0))
        path = self.path(part, split, encoder, dataset, collator)
        with self.storage.atomic(path.name) as temporary:
            write(temporary)
        return path

    def find(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        say: Say = on_stderr,
    ) -> Path | None:
        """The file of those features, if they are computed; then it is here as well."""
        keys = self._keys(split, encoder, dataset, collator)
        if not keys or self.storage.glob(f"{glob.escape(part)}-{split}-*.safetensors"):
            own = self.path(part, split, encoder, dataset, collator)
            if self.has(own):
                return own
        return next((path for key in keys for place in self._places if (path := place.find(key, say))), None)

    def has(self, path: Path) -> bool:
        """Whether the run's own features of that path are computed; then they are here as well."""
        if not path.is_file():  # its name says what is in it: it is never out of date
            self.storage.pull(path.name)
        return path.is_file()

    def path(self, part: str, split: str, encoder: FeatureEncoder, dataset: Dataset, collator: Collator) -> Path:
        """Where the run's own features are, or would be."""
        key = feature_key(encoder.encoder_state(), dataset.manifest_hash, collator.item_format, split, self.dtype)
        return self.storage.folder / f"{part}-{split}-{key[:16]}.safetensors"

    def address(self, path: Path) -> str:
        """What other nodes find a table by: its name below the run's features, or that of a shared one (a URI or path).

        `opened` takes it.
        """
        for place in self._places:
            if path.parent == place.storage.folder:
                return address_of(place, path)
        return path.name

    def opened(self, address: str) -> Path | None:
        """The table of an address, on this node; None: it is there no more."""
        if "/" in address:
            place, key = open_address(address)
            return place.find(key, on_stderr)
        path = self.storage.folder / address
        return path if self.has(path) else None

    def _keys(self, split: str, encoder: FeatureEncoder, dataset: Dataset, collator: Collator) -> list[str]:
        """Of shared tables that have those features, or more of them; none where they are the run's own."""
        if not self._places:
            return []
        side: Side = "entities" if split == KB else "mentions"
        found = (content_key(encoder, records, collator, side, self.dtype) for records in content_of(dataset, split))
        return [key for key in found if key is not None]


@torch.no_grad()
def encode_split(
    path: Path,
    split: str,
    encoder: FeatureEncoder,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    count_rows: CountRows = lambda count: None,
) -> None:
    """Encodes a whole split (or the kb) batch by batch into a table file; a missing picture's tokens are kept once."""
    encoder.eval()  # what dropout leaves out is no feature
    encode = encoder.encode_entities if split == KB else encoder.encode_mentions
    with TableWriter(path) as writer:
        for table, has_image in _encoded(item_batches(split, dataset, collator), encode, device):
            lacking = dict.fromkeys(encoder.image_token_columns(), ~has_image)
            writer.append(table.to(torch.device("cpu")).cast(dtype), lacking)
            count_rows(len(has_image))


@torch.no_grad()
def encode_rows(
    rows: range,
    encoder: FeatureEncoder,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Table:
    """Features of some rows of the kb, on the device: what `encode_split` writes of them.

    They are the same to the last bit where `rows` starts at a multiple of the batch size (256).
    """
    return encode_entities(dataset.entities(rows), encoder, collator, device, dtype)


@torch.no_grad()
def encode_entities(
    entities: Iterable[Entity],
    encoder: FeatureEncoder,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Table:
    """Features of some entities, on the device; the missing picture's tokens are kept once."""
    encoder.eval()
    items = (collator.entities(chunk) for chunk in chunked(entities, BATCH_SIZE))
    batches = list(_encoded(items, encoder.encode_entities, device))
    table = concatenate([table for table, _ in batches]).cast(dtype)
    missing_N = ~torch.cat([has_image for _, has_image in batches]).to(device)
    columns = [name for name in encoder.image_token_columns() if name in table.columns]
    shared = {name: table.ragged(name).sharing(missing_N) for name in columns}
    return table.merged(Table(shared))


def _encoded(
    batches: Iterable[ItemBatch], encode: Callable[[ItemBatch], Table], device: torch.device
) -> Iterator[tuple[Table, Tensor]]:
    """Features batch by batch, and which items of the batch have a picture (bool [N], CPU)."""
    return map_alone(lambda batch: (encode(batch.to(device)), batch.has_image), batches, device)


def item_batches(
    split: str, dataset: Dataset, collator: Collator, rows: Sequence[int] | None = None
) -> Iterator[ItemBatch]:
    """A split's mentions in shard order, or (split "kb") entities in row order, in batches of `BATCH_SIZE`.

    They are read, decoded and tokenized ahead of the reader, by several threads.

    Args:
        rows: Those of the split or kb that are wanted, ascending; None: all.
    """
    if split == KB:
        return map_ahead(collator.entities, chunked(dataset.entities(rows), BATCH_SIZE), num_readers())
    return map_ahead(collator.mentions, chunked(dataset.mentions(split, rows), BATCH_SIZE), num_readers())


def num_readers() -> int:
    """Threads that decode and tokenize while an encoder is at work."""
    return min(max(torch.get_num_threads(), _LEAST_READERS), _MOST_READERS)


def load_features(files: Iterable[Path], kept: Sequence[int] | None = None) -> Table:
    """A part's features, memory-mapped: the columns of all its files side by side.

    Args:
        kept: Of a view's split, its rows in the whole split (`Dataset.kept`): a file may hold them alone, or all.
    """
    merged = Table({})
    for path in files:
        table = Table.load(path)
        if kept is not None and len(table) != len(kept):
            table = table.rows(torch.tensor(kept, dtype=torch.int64))
        merged = merged.merged(table)
    return merged


def whole_features(tables: Mapping[str, Table], parts: Sequence[str]) -> Table:
    """Columns of several parts side by side, each under its part's name."""
    merged = Table({})
    for part in parts:
        merged = merged.merged(tables[part].prefixed(part))
    return merged
