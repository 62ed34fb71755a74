"""The published matcher's three units together, with random weights and features."""

import torch
from torch import Tensor, nn

from dsmip.data.table import Ragged, Table
from dsmip.units.cross_unit import CrossUnit
from dsmip.units.text_unit import TextUnit
from dsmip.units.unit_scorer import ImageNorm, TextNorm
from dsmip.units.visual_unit import VisualUnit


class Units(nn.Module):
    """All three units as the published matcher joins them."""

    def __init__(self, text_width: int, image_width: int, width: int) -> None:
        super().__init__()
        self.text_norm = TextNorm(text_width, text_width)
        self.picture_norm = ImageNorm(text_width, image_width, width)
        self.text = TextUnit(text_width, text_width, width)
        self.image = VisualUnit(width)
        self.cross = CrossUnit(text_width, width)

    def prepare(self, side: str, features: Table) -> dict[str, Table]:
        text, text_tokens = self.text_norm(features.dense("text"), features.ragged("text_tokens"))
        image, image_tokens = self.picture_norm(features.dense("image"), features.ragged("image_tokens"))
        inputs = {
            "text": (text, text_tokens),
            "image": (image, image_tokens),
            "cross": (text, image_tokens),
        }
        return {name: getattr(getattr(self, name), f"prepare_{side}")(*x) for name, x in inputs.items()}

    def scores(self, mentions: Table, entities: Table) -> dict[str, Tensor]:
        m, e = self.prepare("mentions", mentions), self.prepare("entities", entities)
        return {name: getattr(self, name).score(m[name], e[name]) for name in m}


def random_features(num_items: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Table:
    """Features of widths 10 (pooled, text tokens) and 12 (picture tokens), 1 to 6 text tokens per item."""
    generator = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(1, 7, (num_items,), generator=generator)
    lengths_N[0], lengths_N[-1] = 6, 2
    tokens_NTw = torch.randn(num_items, 6, 10, generator=generator, dtype=dtype)
    return Table(
        {
            "text": torch.randn(num_items, 10, generator=generator, dtype=dtype),
            "text_tokens": Ragged.from_padded(tokens_NTw, torch.arange(6) < lengths_N[:, None]),
            "image": torch.randn(num_items, 10, generator=generator, dtype=dtype),
            "image_tokens": Ragged.from_padded(torch.randn(num_items, 5, 12, generator=generator, dtype=dtype)),
        }
    )


def random_units(seed: int = 0) -> Units:
    torch.manual_seed(seed)
    units = Units(10, 12, 8)
    for parameter in units.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return units.double()
