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
from dsmip.table import Table, concatenate
from dsmip.table_writer import TableWriter

Item = TypeVar("Item")
Progress = Callable[[int], None]
BATCH_SIZE = 256  # rows that an encoder takes at once


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
            encode_split(path, split, encoder, dataset, collator, device, self.dtype, progress)
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
    path: Path,
    split: str,
    encoder: FeatureEncoder,
    dataset: Dataset,
    collator: Collator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda count: None,
) -> None:
    """Encodes a whole split (or the kb) batch by batch into a table file; a missing picture's tokens are kept once.

    Picture tokens are ragged columns whose last name part is `image_tokens`: they depend on the picture alone.
    """
    encode = encoder.encode_entities if split == KB else encoder.encode_mentions
    with TableWriter(path) as writer:
        for batch in _batches(split, dataset, collator):
            table = encode(batch.to(device)).to(torch.device("cpu")).cast(dtype)
            pictures = [name for name in table.columns if name.split(".")[-1] == "image_tokens"]
            writer.append(table, dict.fromkeys(pictures, ~batch.has_image))
            progress(len(batch))


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
