"""An encoder for tests that counts its calls."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table


def patches(batch: ItemBatch, weight: Tensor) -> Tensor:
    """Four pixels of each picture [N, 4, 3]."""
    return batch.images.float().flatten(2).transpose(1, 2)[:, :4] * weight


class CountingEncoder:
    """Features made of token ids and pictures; notes how often it is asked.

    Args:
        form: Its `shared_form`.
    """

    def __init__(self, weight: float = 1.0, form: str | None = None) -> None:
        self.weight, self.calls, self.drops = torch.tensor([weight]), 0, True
        self._form = form

    def to(self, device: torch.device) -> Self:
        self.weight = self.weight.to(device)
        return self

    def eval(self) -> Self:
        self.drops = False
        return self

    def encode_mentions(self, batch: ItemBatch) -> Table:
        self.calls += 1
        tokens = Ragged.from_padded(patches(batch, self.weight))
        return Table({"text_global": batch.token_ids[:, :2].float(), "image_tokens": tokens})

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self.encode_mentions(batch)

    def encoder_state(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def image_token_columns(self) -> list[str]:
        return ["image_tokens"]

    def shared_form(self) -> str | None:
        return self._form
