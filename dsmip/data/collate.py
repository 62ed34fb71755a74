"""Records as tensors: batches of items with their texts and pictures, and the rows of golds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS, PixelForm, UnreadableImage, decode, fit
from dsmip.data.records import Entity, Mention
from dsmip.data.text import Template, Tokenizer, Tokens, before_word, entity_text, mention_text
from dsmip.errors import UserError

Modality = Literal["text", "image"]
Item = TypeVar("Item", Mention, Entity)
_KEPT_BYTES = 256 << 20  # decoded pictures that a collator keeps: all of a small data set, a sliver of a large one


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """N mentions or N entities before encoding.

    Attributes:
        token_ids: int64 [N, L] with L at most the text tower's context length, trimmed to the longest text of the batch
            or not; the tokenizer's padding behind a text, which some towers read.
        token_mask: bool [N, L], True from a text's first token to its last; the first place is always True.
        images: uint8 [N, 3, S, S], all zero where `has_image` is False.
        has_image: bool [N].
        extras: Further tensors [N, ...] by name, as the system's `ItemFormat` asks for.
    """

    token_ids: Tensor
    token_mask: Tensor
    images: Tensor
    has_image: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> "ItemBatch":
        """The same batch on `device`."""
        return ItemBatch(
            self.token_ids.to(device, non_blocking=True),
            self.token_mask.to(device, non_blocking=True),
            self.images.to(device, non_blocking=True),
            self.has_image.to(device, non_blocking=True),
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.extras.items()},
        )

    def rows(self, start: int, stop: int) -> "ItemBatch":
        """Items start..stop (views)."""
        rows = slice(start, stop)
        extras = {name: tensor[rows] for name, tensor in self.extras.items()}
        return ItemBatch(self.token_ids[rows], self.token_mask[rows], self.images[rows], self.has_image[rows], extras)


def stacked(first: ItemBatch, second: ItemBatch) -> ItemBatch:
    """Items of both batches, texts padded to the longer of the two."""

    def joined(one: Tensor, other: Tensor) -> Tensor:
        length = max(one.shape[1], other.shape[1])
        return torch.cat([functional.pad(each, (0, length - each.shape[1])) for each in (one, other)])

    return ItemBatch(
        joined(first.token_ids, second.token_ids),
        joined(first.token_mask, second.token_mask),
        torch.cat([first.images, second.images]),
        torch.cat([first.has_image, second.has_image]),
        {name: joined(tensor, second.extras[name]) for name, tensor in first.extras.items()},
    )


@dataclass(frozen=True, slots=True)
class ItemFormat:
    """What a part reads of an item, and how its text is written.

    A modality that is not read is not decoded: its texts are empty, or its pictures are missing.

    Attributes:
        modalities: Of mentions, and of entities too unless `entity_modalities` says otherwise.
        reserve: Positions kept free for prompts.
        num_tokens: Every text is padded (and cut) to exactly this length, for systems that attend over padding; None
            trims a batch to its longest text.
        pixels: How pictures become squares; None: as the backbone's weights expect it.
        markers: Tokens that the template writes out, such as [unused0]; the tokenizer must have each of them.
        texts: Further texts of an item, by name: `ItemBatch.extras` has each as <name>_ids and <name>_mask.
        word_places: `ItemBatch.extras` has `word_places`, bool [N, L]: which tokens are the mention's word, or the
            entity's name; none of them where it is cut off.
    """

    template: Template
    reserve: int = 0
    num_tokens: int | None = None
    modalities: tuple[Modality, ...] = ("text", "image")
    pixels: PixelForm | None = None
    markers: tuple[str, ...] = ()
    texts: tuple[tuple[str, Template], ...] = ()
    word_places: bool = False
    entity_modalities: tuple[Modality, ...] | None = None

    @property
    def of_entities(self) -> tuple[Modality, ...]:
        """What is read of an entity."""
        return self.modalities if self.entity_modalities is None else self.entity_modalities

    @property
    def of_either(self) -> tuple[Modality, ...]:
        """What is read of mentions, of entities, or of both."""
        return tuple(dict.fromkeys((*self.modalities, *self.of_entities)))


class Collator:
    """Makes batches for one part: tokenizes, decodes and fits pictures. An unreadable picture counts as missing."""

    def __init__(self, tokenizer: Tokenizer, item_format: ItemFormat, image_size: int) -> None:
        self.tokenizer, self.item_format = tokenizer, item_format
        self.image_size = image_size
        self._images = ImageCollator(image_size, item_format.pixels or CLIP_PIXELS)

    def mentions(self, mentions: Sequence[Mention]) -> ItemBatch:
        """A batch of mentions, in order."""
        text_of = partial(mention_text, without=self.item_format.markers)
        return self._batch(text_of, mentions, self.item_format.modalities)

    def entities(self, entities: Sequence[Entity], *, as_mentions: bool = False) -> ItemBatch:
        """A batch of entities with their first picture, in order.

        Args:
            as_mentions: They are read as mentions are, where that differs.
        """
        text_of = partial(entity_text, without=self.item_format.markers)
        modalities = self.item_format.modalities if as_mentions else self.item_format.of_entities
        return self._batch(text_of, entities, modalities)

    def _batch(
        self, text_of: Callable[[Item, Template], str], items: Sequence[Item], modalities: Sequence[Modality]
    ) -> ItemBatch:
        images, has_image = self._images(items if "image" in modalities else [None] * len(items))
        reads_texts = "text" in modalities
        tokens = self._tokens([text_of(item, self.item_format.template) if reads_texts else "" for item in items])
        extras: dict[str, Tensor] = {}
        for name, template in self.item_format.texts:
            further = self.tokenizer([text_of(item, template) for item in items])
            extras |= {f"{name}_ids": further.ids, f"{name}_mask": further.mask}
        if self.item_format.word_places:
            extras["word_places"] = self._word_places(tokens, items)
        return ItemBatch(*tokens, images, has_image, extras)

    def _word_places(self, tokens: Tokens, items: Sequence[Mention | Entity]) -> Tensor:
        """Where a line's tokens are no longer those of what stands before the word, up to where they are with it."""
        template, markers = self.item_format.template, self.item_format.markers
        pairs = [before_word(item, template, markers) for item in items]
        first_N1, stop_N1 = (_num_alike(tokens, self._tokens([pair[end] for pair in pairs])) for end in (0, 1))
        place_L, end_N1 = torch.arange(tokens.ids.shape[1]), tokens.mask.sum(dim=1, keepdim=True) - 1
        stop_N1 = torch.minimum(torch.maximum(stop_N1, first_N1 + 1), end_N1)  # the token that ends a text is no word
        return (place_L >= first_N1) & (place_L < stop_N1)

    def _tokens(self, texts: list[str]) -> Tokens:
        length = self.item_format.num_tokens
        if length is None:
            return self.tokenizer(texts, self.item_format.reserve)
        ids, mask = self.tokenizer(texts, self.tokenizer.context_length - length)
        missing = (0, length - ids.shape[1])
        return Tokens(functional.pad(ids, missing, value=self.tokenizer.pad_id), functional.pad(mask, missing))


def _num_alike(whole: Tokens, start: Tokens) -> Tensor:
    """How many of the first tokens two texts share, int64 [N, 1]; the last token of `start` ends it and is none."""
    length = min(whole.ids.shape[1], start.ids.shape[1])
    alike = (whole.ids[:, :length] == start.ids[:, :length]) & whole.mask[:, :length] & start.mask[:, :length]
    return alike.long().cumprod(dim=1).sum(dim=1, keepdim=True).clamp_max(start.mask.sum(dim=1, keepdim=True) - 1)


class ImageCollator:
    """Makes batches of the pictures alone: a mention's, an entity's first."""

    def __init__(self, image_size: int, pixels: PixelForm = CLIP_PIXELS) -> None:
        self.image_size = image_size
        kept = _KEPT_BYTES // (3 * image_size**2)
        self._fitted_image = lru_cache(maxsize=kept)(lambda image: _fitted(image, image_size, pixels))

    def __call__(self, items: Sequence[Mention | Entity | None]) -> tuple[Tensor, Tensor]:
        """(uint8 [N, 3, S, S], bool [N]); zeros and False for None, and where there is no readable picture."""
        images = torch.zeros(len(items), 3, self.image_size, self.image_size, dtype=torch.uint8)
        has_image = torch.zeros(len(items), dtype=torch.bool)
        for row, item in enumerate(items):
            image = _image(item)
            fitted = None if image is None else self._fitted_image(image)
            if fitted is not None:
                images[row], has_image[row] = fitted, True
        return images, has_image


def gold_rows(dataset: Dataset, split: str) -> Tensor:
    """kb row of each mention's gold, int64 [M], in shard order (the order of cached features).

    Raises:
        UserError: The split has no mentions, or a gold is no row of the kb.
    """
    rows = []
    for mention in dataset.mentions(split):
        if not 0 <= mention.entity_row < dataset.num_entities:
            raise UserError(
                f"{dataset.location}: the gold of mention {mention.mention_id} in '{split}' is row "
                f"{mention.entity_row} of the kb, which has {dataset.num_entities} entities; prepare the data set again"
            )
        rows.append(mention.entity_row)
    if not rows:
        raise UserError(f"split '{split}' of {dataset.location} has no mentions")
    return torch.tensor(rows, dtype=torch.int64)


def _image(item: Mention | Entity | None) -> bytes | None:
    if isinstance(item, Entity):
        return item.images[0] if item.images else None
    return None if item is None else item.image


def _fitted(image: bytes, size: int, pixels: PixelForm) -> Tensor | None:
    try:
        return fit(decode(image), size, pixels)
    except UnreadableImage:
        return None
