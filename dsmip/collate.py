"""From records to an `ItemBatch`: texts by the system's templates, one picture per item."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsmip.batches import ItemBatch
from dsmip.pictures import collate
from dsmip.records import Entity, Mention
from dsmip.text import Template, Tokenizer, entity_text, mention_text


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a system writes its texts.

    reserve: positions kept free for prompts. num_tokens: every text is padded (and cut) to exactly this length, for
    systems that attend over padding; None trims a batch to its longest text.
    """

    template: Template
    reserve: int = 0
    num_tokens: int | None = None


class Collator:
    """Makes batches for one part: tokenizes, decodes and fits pictures. An unreadable picture counts as missing."""

    def __init__(self, tokenizer: Tokenizer, text_format: TextFormat, image_size: int) -> None:
        self.tokenizer, self.text_format, self.image_size = tokenizer, text_format, image_size

    def mentions(self, mentions: Sequence[Mention]) -> ItemBatch:
        """A batch of mentions, in order."""
        texts = [mention_text(mention, self.text_format.template) for mention in mentions]
        return self._batch(texts, [mention.image for mention in mentions])

    def entities(self, entities: Sequence[Entity]) -> ItemBatch:
        """A batch of entities with their first picture, in order."""
        texts = [entity_text(entity, self.text_format.template) for entity in entities]
        return self._batch(texts, [entity.images[0] if entity.images else None for entity in entities])

    def _batch(self, texts: list[str], images: list[bytes | None]) -> ItemBatch:
        length = self.text_format.num_tokens
        reserve = self.text_format.reserve if length is None else self.tokenizer.context_length - length
        batch = collate(texts, images, self.tokenizer, self.image_size, reserve=reserve)
        if length is None:
            return batch
        padded = torch.zeros(len(texts), length, dtype=torch.int64)
        padded[:, : batch.token_ids.shape[1]] = batch.token_ids
        return ItemBatch(padded, batch.pictures, batch.has_image)
