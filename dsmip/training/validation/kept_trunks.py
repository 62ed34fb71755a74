"""Outputs of frozen trunks for the items that every validation encodes: kept on this node's disk, read again.

A trunk is a tower without its projection. Where a text tower trains alone (`tune: text`, prompts in it), or projections
do, the others say the same of an item in every validation. Pictures that only such trunks see are read once. A file has
no name once it is open, so it goes with the process, even with a killed one.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB
from dsmip.data.records import Entity, Mention, make_entity
from dsmip.data.table import Ragged, Table
from dsmip.encoders import feature_cache
from dsmip.encoders.clip import Backbone
from dsmip.encoders.towers.base import TrunkFeatures
from dsmip.parallel import map_ahead
from dsmip.storage.cache import spare_bytes
from dsmip.units.matcher import Matcher

_FIELDS = ("unprojected", "tokens", "mask")
_HAS_IMAGE = "has_image"
_NO_PICTURE = 255  # at every place of a picture that is not there: a missing one is black
Chunk = tuple[int, ...]  # rows of a batch


@dataclass
class KeptBatch:
    """The `TrunkKeeper` of a batch: notes what frozen trunks say, call by call, or says it again.

    Attributes:
        kept: What was noted; None: nothing is known yet.
    """

    device: torch.device
    kept: dict[str, Tensor] | None = None
    has_no_images: bool = False
    noted: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def __call__(self, tower: str, trunk: Callable[[], TrunkFeatures]) -> TrunkFeatures:
        self.calls += 1
        names = {name: f"{self.calls} {tower} {name}" for name in _FIELDS}
        if self.kept is not None:
            return TrunkFeatures(**{n: self.kept[key].to(self.device) for n, key in names.items() if key in self.kept})
        said = trunk()
        for name, key in names.items():
            tensor: Tensor | None = getattr(said, name)
            if tensor is not None:
                self.noted[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return said


class KeptTrunks:
    """Batches of items for a matcher, as often as they are asked for, with what frozen trunks said of them before.

    Args:
        matcher: Nothing that is frozen of it changes.
        say: Told when the disk has no room for more: of further batches nothing is kept.
    """

    def __init__(
        self, matcher: Matcher, dataset: Dataset, collator: Collator, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._matcher, self._dataset, self._collator, self._device, self._say = matcher, dataset, collator, device, say
        self._backbones = [module for module in matcher.modules() if isinstance(module, Backbone)]
        self._kept: dict[tuple[str, Chunk], dict[str, Tensor]] = {}
        self._sees_images: dict[str, bool] = {}  # by split: something that trains does
        self._is_full = False

    def batches(self, split: str, rows: Sequence[int]) -> Iterator[ItemBatch]:
        """As `item_batches`. Until the next one is asked for, the matcher's frozen trunks say of it what they said."""
        try:
            for chunk, batch in self._read(split, rows):
                kept = self._kept.get((split, chunk))
                blank = kept is not None and not self._sees_images.get(split, True)
                keeper = KeptBatch(self._device, kept, blank)
                self._hand_out(keeper)
                yield batch
                if keeper.noted and not self._is_full:
                    self._keep(split, chunk, batch, keeper.noted)
        finally:
            self._hand_out(None)

    def _read(self, split: str, rows: Sequence[int]) -> Iterator[tuple[Chunk, ItemBatch]]:
        size = feature_cache.BATCH_SIZE
        chunks = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
        blank = {c: (split, c) in self._kept and not self._sees_images.get(split, True) for c in chunks}
        with_images = [row for chunk in chunks if not blank[chunk] for row in chunk]
        whole = feature_cache.chunked(_items(self._dataset, split, with_images), size)
        texts = feature_cache.chunked(_texts(self._dataset, split, [r for c in chunks if blank[c] for r in c]), size)

        def collated(item: tuple[Chunk, list[Any]]) -> tuple[Chunk, ItemBatch]:
            chunk, items = item
            batch = self._collator.entities(items) if split == KB else self._collator.mentions(items)
            return chunk, _blank(batch, self._kept[split, chunk]) if blank[chunk] else batch

        drawn = ((chunk, next(texts if blank[chunk] else whole)) for chunk in chunks)
        return map_ahead(collated, drawn, feature_cache.num_readers())

    def _keep(self, split: str, chunk: Chunk, batch: ItemBatch, noted: dict[str, Tensor]) -> None:
        kept = self._on_disk({**noted, _HAS_IMAGE: batch.has_image})
        if kept is None:
            return
        if split not in self._sees_images and batch.has_image.any():  # else no answer would say anything
            self._sees_images[split] = not self._is_same_without_images(split, batch, kept)
        self._kept[split, chunk] = kept

    def _is_same_without_images(self, split: str, batch: ItemBatch, kept: dict[str, Tensor]) -> bool:
        """Whether a batch has the same features to the last bit when its pictures are not there."""
        encode = self._matcher.encode_entities if split == KB else self._matcher.encode_mentions
        found = []
        for has_no_images, each in ((False, batch), (True, _blank(batch, kept))):
            self._hand_out(KeptBatch(self._device, kept, has_no_images))
            with torch.no_grad():
                found.append(encode(each.to(self._device)))
        return _are_equal(*found)

    def _hand_out(self, keeper: KeptBatch | None) -> None:
        for backbone in self._backbones:
            backbone.keeper = keeper

    def _on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The same tensors, memory-mapped; None: there is no room."""
        folder = Path(tempfile.gettempdir())
        wanted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if wanted > spare_bytes(folder):
            self._stop(folder)
            return None
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix="dsmip-trunks-") as file:
                save_file(tensors, file.name)
                return load_file(file.name)
        except (OSError, SafetensorError):  # others write, too, and there may be a quota
            self._stop(folder)
            return None

    def _stop(self, folder: Path) -> None:
        self._is_full = True
        self._say(f"{folder} has no room for what frozen towers say of the rest: validations encode it each time")


def _blank(batch: ItemBatch, kept: dict[str, Tensor]) -> ItemBatch:
    images = torch.full((), _NO_PICTURE, dtype=torch.uint8).expand(batch.images.shape)
    return replace(batch, images=images, has_image=kept[_HAS_IMAGE])


def _are_equal(one: Table, other: Table) -> bool:
    for name, column in one.columns.items():
        twin = other.columns[name]
        if isinstance(column, Ragged):
            assert isinstance(twin, Ragged)
            alike = torch.equal(column.lengths, twin.lengths) and torch.equal(column.values, twin.values)
        else:
            alike = torch.equal(one.dense(name), other.dense(name))
        if not alike:
            return False
    return True


def _items(dataset: Dataset, split: str, rows: Sequence[int]) -> Iterator[Entity | Mention]:
    if not rows:
        return iter(())
    return dataset.entities(rows) if split == KB else dataset.mentions(split, rows)


def _texts(dataset: Dataset, split: str, rows: Sequence[int]) -> Iterator[Entity | Mention]:
    """Items without their pictures, which are not read."""
    if not rows:
        return iter(())
    if split == KB:
        return (make_entity(record, ()) for record in dataset.entity_texts().take(list(rows)).to_pylist())
    wanted = set(rows)
    return (mention for row, mention in enumerate(dataset.texts(split)) if row in wanted)
