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

from dsmip.batches import ItemBatch
from dsmip.collate import Collator
from dsmip.manifest import KB
from dsmip.models.base import FeatureEncoder, Matcher
from dsmip.shards import Dataset
from dsmip.table import Column, Ragged, Table, concatenate

Item = TypeVar("Item")
Progress = Callable[[int], None]
_BATCH_SIZE = 256


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class FeatureCache:
    """Feature tables of one run, in `folder/<part>-<split>-<hash>.safetensors`."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype

    def table(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        progress: Progress = lambda count: None,
    ) -> Table:
        """Features of a split's mentions (in shard order) or of the kb (split "kb", in row order)."""
        return Table.load(self.ensure(part, split, encoder, dataset, collator, device, progress))

    def ensure(
        self,
        part: str,
        split: str,
        encoder: FeatureEncoder,
        dataset: Dataset,
        collator: Collator,
        device: torch.device,
        progress: Progress = lambda count: None,
    ) -> Path:
        """The file of those features, computed unless it is there."""
        key = fingerprint(encoder.encoder_state(), dataset.manifest_hash, collator.item_format, split, self.dtype)
        path = self.folder / f"{part}-{split}-{key[:16]}.safetensors"
        if not path.is_file():
            encode_split(split, encoder, dataset, collator, device, self.dtype, progress).save(path)
        return path


def fingerprint(weights: Mapping[str, Tensor], *settings: object) -> str:
    """Hex digest of named tensors and of anything with a stable text form."""
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_split(
    split: str,
    encoder: FeatureEncoder,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda count: None,
) -> Table:
    """Encodes a whole split (or the kb) in batches; a missing picture's tokens are kept once."""
    encode = encoder.encode_entities if split == KB else encoder.encode_mentions
    tables: list[Table] = []
    has_image: list[Tensor] = []
    for batch in _batches(split, dataset, collator):
        table = encode(batch.to(device)).to(torch.device("cpu"))
        tables.append(table.cast(dtype))
        has_image.append(batch.has_image)
        progress(len(batch))
    return share_missing_pictures(concatenate(tables), torch.cat(has_image))


@torch.no_grad()
def prepare_split(
    split: str,
    matcher: Matcher,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    rows: range | None = None,
) -> Table:
    """Encodes and prepares a split (or `rows` of the kb) batch by batch: features are never held as a whole."""
    if split == KB:
        encode, prepare = matcher.encode_entities, matcher.prepare_entities
    else:
        encode, prepare = matcher.encode_mentions, matcher.prepare_mentions
    matcher.eval()
    return concatenate([prepare(encode(batch.to(device))) for batch in _batches(split, dataset, collator, rows)])


def _batches(split: str, dataset: Dataset, collator: Collator, rows: range | None = None) -> Iterator[ItemBatch]:
    if split == KB:
        return (collator.entities(chunk) for chunk in chunked(dataset.entities(rows), _BATCH_SIZE))
    return (collator.mentions(chunk) for chunk in chunked(dataset.mentions(split), _BATCH_SIZE))


def share_missing_pictures(table: Table, has_image_N: Tensor) -> Table:
    """Lets all items without a picture point at the picture tokens of the first of them.

    Ragged columns whose last name part is `image_tokens` depend on the picture alone.
    """
    missing_K = (~has_image_N).nonzero()[:, 0]
    if len(missing_K) == 0:
        return table
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        if isinstance(column, Ragged) and name.split(".")[-1] == "image_tokens":
            starts, lengths = column.starts.clone(), column.lengths.clone()
            first = int(missing_K[0])
            starts[missing_K], lengths[missing_K] = int(starts[first]), int(lengths[first])
            columns[name] = Ragged(column.values, starts, lengths).compact()
        else:
            columns[name] = column
    return Table(columns)


def whole_features(tables: Mapping[str, Table], parts: Sequence[str]) -> Table:
    """Columns of several parts side by side, each under its part's name."""
    merged = Table({})
    for part in parts:
        merged = merged.merged(tables[part].prefixed(part))
    return merged
