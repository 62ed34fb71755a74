"""From records to an `ItemBatch`: texts by the system's templates, one picture per item."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dsmip.batches import ItemBatch
from dsmip.images import UnreadablePicture, decode, fit
from dsmip.records import Entity, Mention
from dsmip.text import Template, Tokenizer, entity_text, mention_text

Modality = Literal["text", "image"]
_KEPT_BYTES = 256 << 20  # decoded pictures that a collator keeps: all of a small data set, a sliver of a large one


@dataclass(frozen=True, slots=True)
class ItemFormat:
    """What a part reads of an item, and how its text is written.

    reserve: positions kept free for prompts. num_tokens: every text is padded (and cut) to exactly this length, for
    systems that attend over padding; None trims a batch to its longest text. A modality that is not read is not
    decoded: its texts are empty, or its pictures are missing.
    """

    template: Template
    reserve: int = 0
    num_tokens: int | None = None
    modalities: tuple[Modality, ...] = ("text", "image")


class Collator:
    """Makes batches for one part: tokenizes, decodes and fits pictures. An unreadable picture counts as missing."""

    def __init__(self, tokenizer: Tokenizer, item_format: ItemFormat, image_size: int) -> None:
        self.tokenizer, self.item_format = tokenizer, item_format
        self._pictures = PictureCollator(image_size)

    def mentions(self, mentions: Sequence[Mention]) -> ItemBatch:
        """A batch of mentions, in order."""
        texts = [mention_text(mention, self.item_format.template) for mention in mentions]
        return self._batch(texts, mentions)

    def entities(self, entities: Sequence[Entity]) -> ItemBatch:
        """A batch of entities with their first picture, in order."""
        texts = [entity_text(entity, self.item_format.template) for entity in entities]
        return self._batch(texts, entities)

    def _batch(self, texts: list[str], items: Sequence[Mention | Entity]) -> ItemBatch:
        shown = items if "image" in self.item_format.modalities else [None] * len(items)
        pictures, has_image = self._pictures(shown)
        return ItemBatch(self._token_ids(texts), pictures, has_image)

    def _token_ids(self, texts: list[str]) -> Tensor:
        if "text" not in self.item_format.modalities:
            texts = [""] * len(texts)
        length = self.item_format.num_tokens
        if length is None:
            return self.tokenizer(texts, self.item_format.reserve)
        token_ids = self.tokenizer(texts, self.tokenizer.context_length - length)
        return torch.nn.functional.pad(token_ids, (0, length - token_ids.shape[1]))


class PictureCollator:
    """Makes batches of the pictures alone: a mention's, an entity's first."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        kept = _KEPT_BYTES // (3 * image_size**2)
        self._picture = lru_cache(maxsize=kept)(lambda image: _fitted(image, image_size))

    def __call__(self, items: Sequence[Mention | Entity | None]) -> tuple[Tensor, Tensor]:
        """(uint8 [N, 3, S, S], bool [N]); zeros and False for None, and where there is no readable picture."""
        pictures = torch.zeros(len(items), 3, self.image_size, self.image_size, dtype=torch.uint8)
        has_image = torch.zeros(len(items), dtype=torch.bool)
        for row, item in enumerate(items):
            image = _image(item)
            picture = None if image is None else self._picture(image)
            if picture is not None:
                pictures[row], has_image[row] = picture, True
        return pictures, has_image


def _image(item: Mention | Entity | None) -> bytes | None:
    if isinstance(item, Entity):
        return item.images[0] if item.images else None
    return None if item is None else item.image


def _fitted(image: bytes, size: int) -> Tensor | None:
    try:
        return fit(decode(image), size)
    except UnreadablePicture:
        return None
