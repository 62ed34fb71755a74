"""What the encoders take: token ids and uint8 pictures of a batch of mentions or of entities."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """N mentions or N entities before encoding.

    token_ids: int64 [N, L], start-of-text ... end-of-text, then zeros; L is at most the backbone's context length and
        may be trimmed to the longest text of the batch.
    pictures: uint8 [N, 3, S, S], all zero where `has_image` is False.
    has_image: bool [N].
    """

    token_ids: Tensor
    pictures: Tensor
    has_image: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> "ItemBatch":
        """The same batch on `device`."""
        return ItemBatch(
            self.token_ids.to(device, non_blocking=True),
            self.pictures.to(device, non_blocking=True),
            self.has_image.to(device, non_blocking=True),
        )

    def rows(self, start: int, stop: int) -> "ItemBatch":
        """Items start..stop (views)."""
        part = slice(start, stop)
        return ItemBatch(self.token_ids[part], self.pictures[part], self.has_image[part])


def stacked(first: ItemBatch, second: ItemBatch) -> ItemBatch:
    """Items of both batches, texts padded with zeros to the longer of the two."""
    length = max(first.token_ids.shape[1], second.token_ids.shape[1])
    ids = [functional.pad(b.token_ids, (0, length - b.token_ids.shape[1])) for b in (first, second)]
    return ItemBatch(
        torch.cat(ids),
        torch.cat([first.pictures, second.pictures]),
        torch.cat([first.has_image, second.has_image]),
    )
