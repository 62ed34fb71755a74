"""Items for the contract's tests: random texts of different length in a tower's vocabulary, a third without picture."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dsmip.data.collate import ItemBatch


@dataclass(frozen=True)
class Sample:
    """Mentions and entities of which an encoder can read all."""

    mentions: ItemBatch
    entities: ItemBatch
    form: "Form"

    def padded(self) -> Iterator[tuple[ItemBatch, ItemBatch]]:
        """Both with little and with much padding, whose ids mean nothing: they would be taken for an end of text."""
        for columns in (1, self.form.places - self.form.longest):
            yield _padded(self.mentions, columns, self.form.end), _padded(self.entities, columns, self.form.end)


@dataclass(frozen=True)
class Form:
    """What an encoder's items look like.

    Attributes:
        start, end: Ids of special tokens.
        words: Ids of all others.
        longest: Text, in tokens.
        places: That it may take with padding.
        image_size: The side of pictures.
    """

    start: int
    end: int
    words: range
    longest: int
    places: int
    image_size: int

    def sample(self, num_mentions: int, num_entities: int) -> Sample:
        return Sample(self.items(num_mentions, seed=2), self.items(num_entities, seed=3), self)

    def items(self, count: int, seed: int) -> ItemBatch:
        generator = torch.Generator().manual_seed(seed)
        lengths_N = torch.randint(3, self.longest + 1, (count,), generator=generator)
        places_L = torch.arange(int(lengths_N.max()))
        mask_NL = places_L < lengths_N[:, None]
        ids = self.words.start, self.words.stop
        token_ids = torch.randint(*ids, (count, len(places_L)), generator=generator)
        token_ids[:, 0] = self.start
        token_ids[torch.arange(count), lengths_N - 1] = self.end
        token_ids[~mask_NL] = 0
        shape = (count, 3, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        has_image = torch.arange(count) % 3 != 1
        images[~has_image] = 0
        word_ids = token_ids[:, :3].clamp(min=1)  # of systems that read an item's name apart
        extras = {"word_ids": word_ids, "word_mask": torch.ones_like(word_ids, dtype=torch.bool)}
        extras["word_places"] = (places_L == 1).expand(count, -1)  # of those that read where the name stands
        return ItemBatch(token_ids, mask_NL, images, has_image, extras)


def trimmed(batch: ItemBatch) -> ItemBatch:
    """Without columns that are padding in every row."""
    longest = int(batch.token_mask.sum(dim=1).max())
    return replace(batch, token_ids=batch.token_ids[:, :longest], token_mask=batch.token_mask[:, :longest])


def filled(batch: ItemBatch, places: int) -> ItemBatch:
    """With so many columns, of which those that are padding in every row have the id 0."""
    batch = trimmed(batch)
    return _padded(batch, places - batch.token_ids.shape[1], 0)


def _padded(batch: ItemBatch, columns: int, token: int) -> ItemBatch:
    ids, mask = torch.full((len(batch), columns), token), torch.zeros(len(batch), columns, dtype=torch.bool)
    padded_ids, padded_mask = torch.cat([batch.token_ids, ids], dim=1), torch.cat([batch.token_mask, mask], dim=1)
    return replace(batch, token_ids=padded_ids, token_mask=padded_mask)
