"""The feature cache: what a frozen encoder says of every item, computed once per split, memory-mapped by all readers.

A cache file's name carries the hash of everything that its content depends on (weights, data, texts, precision), so a
stale file is never read and a finished one is never computed again.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dsmip.data.collate import Collator, ItemBatch, ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS
from dsmip.data.manifest import KB
from dsmip.data.records import Entity
from dsmip.data.table import Table, concatenate
from dsmip.data.table_writer import TableWriter
from dsmip.encoders.base import FeatureEncoder
from dsmip.keys import plain_text
from dsmip.parallel import map_alone
from dsmip.progress import CountRows
from dsmip.storage.locations import Location, open_run_storage

Item = TypeVar("Item")
BATCH_SIZE = 256  # rows that an encoder takes at once
_DTYPES = {torch.float32: "torch.float32", torch.float16: "torch.float16"}  # words of a key


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class FeatureCache:
    """Feature tables of one run, `<part>-<split>-<hash>.safetensors`; of a run in a store, nodes take one another's."""

    def __init__(self, location: Location, dtype: torch.dtype = torch.float32) -> None:
        self.storage, self.dtype = open_run_storage(location), dtype

    def table(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        count_rows: CountRows = lambda count: None,
    ) -> Table:
        """Features of a split's mentions (in shard order) or of the kb (split "kb", in row order)."""
        return Table.load(self.ensure(part, split, encoder, dataset, collator, device, count_rows))

    def ensure(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        count_rows: CountRows = lambda count: None,
    ) -> Path:
        """The file of those features, computed unless it is there."""
        path = self.path(part, split, encoder, dataset, collator)
        if not self.has(path):
            with self.storage.atomic(path.name) as temporary:
                encode_split(temporary, split, encoder, dataset, collator, device, self.dtype, count_rows)
        return path

    def has(self, path: Path) -> bool:
        """Whether the features of that path are computed; then they are here as well."""
        if not path.is_file():  # its name says what is in it: it is never out of date
            self.storage.pull(path.name)
        return path.is_file()

    def path(self, part: str, split: str, encoder: FeatureEncoder, dataset: Dataset, collator: Collator) -> Path:
        """Where those features are, or would be."""
        key = feature_key(encoder.encoder_state(), dataset.manifest_hash, collator.item_format, split, self.dtype)
        return self.storage.folder / f"{part}-{split}-{key[:16]}.safetensors"


def feature_key(
    weights: Mapping[str, Tensor], manifest_hash: str, item_format: ItemFormat, split: str, dtype: torch.dtype
) -> str:
    """Hex digest of all that a feature table depends on, version 1.

    The text is written out so that no name in the code is part of it: its words are those that the first caches were
    keyed by, and stay. A field that is added to `ItemFormat` or `Template` goes into the text only where its value
    changes what an encoder reads; a text that means something else starts with "version 2".
    """
    template, tokens = item_format.template, item_format.num_tokens
    texts = f"Template(mention={template.mention!r}, entity={template.entity!r})"
    modalities = plain_text(item_format.modalities)
    items = f"ItemFormat(template={texts}, reserve={item_format.reserve}, num_tokens={tokens}, modalities={modalities})"
    if (pixels := item_format.pixels) not in (None, CLIP_PIXELS):
        part = () if pixels.part == 1 else (pixels.part,)
        items += f", {plain_text((pixels.resize, pixels.filter, *part))}"
    if item_format.entity_modalities is not None:
        items += f", entity_modalities={plain_text(item_format.entity_modalities)}"
    if item_format.texts:
        further = tuple((name, each.mention, each.entity) for name, each in item_format.texts)
        items += f", texts={plain_text(further)}"
    if item_format.word_places:
        items += ", word_places=True"
    if item_format.markers:
        items += f", markers={plain_text(item_format.markers)}"
    return fingerprint(weights, f"({manifest_hash!r}, {items}, {split!r}, {_DTYPES[dtype]})")


def fingerprint(weights: Mapping[str, Tensor], settings: str) -> str:
    """Hex digest of named tensors and of a text."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def item_batches(split: str, dataset: Dataset, collator: Collator, rows: range | None = None) -> Iterator[ItemBatch]:
    """A split's mentions in shard order, or (split "kb") entities of `rows` or all, in batches of `BATCH_SIZE`."""
    if split == KB:
        return (collator.entities(chunk) for chunk in chunked(dataset.entities(rows), BATCH_SIZE))
    return (collator.mentions(chunk) for chunk in chunked(dataset.mentions(split), BATCH_SIZE))


def load_features(files: Iterable[Path]) -> Table:
    """A part's features, memory-mapped: the columns of all its files side by side."""
    merged = Table({})
    for path in files:
        merged = merged.merged(Table.load(path))
    return merged


def whole_features(tables: Mapping[str, Table], parts: Sequence[str]) -> Table:
    """Columns of several parts side by side, each under its part's name."""
    merged = Table({})
    for part in parts:
        merged = merged.merged(tables[part].prefixed(part))
    return merged
