"""M3EL's cross units: one way (into one vector) or bidirectional (a vector for each direction).

N items, P tokens, z width of pooled texts, d unit width. Everything is float32: call it outside autocast.
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.table import Ragged, Table
from dsmip.ops.match import match, pooled_by_temperature
from dsmip.units.cross_unit import FusedUnit, words_map

MatchKeys = Literal["pooled", "tokens"]


class _MatchUnit(FusedUnit):
    """Maps, gate and norm of both; what mentions and entities become is the same.

    Attributes:
        match_keys: What the tokens of one modality are matched with: the other's `pooled` vector, as published, or its
            `tokens`. A softmax over the one pooled vector is 1, so that what the tokens find is that vector whatever
            they are: the pooled branch of the published unit does not see them.
    """

    reads = ("text_global", "text_tokens", "image_global", "image_tokens")

    def __init__(self, text_width: int, token_width: int, width: int, match_keys: MatchKeys) -> None:
        super().__init__()
        self.match_keys = match_keys
        self.words_fc = words_map(text_width, token_width, width) if self._reads_words else None
        self.text_fc = nn.Linear(text_width, width)
        self.image_fc = nn.Linear(width, width)
        self.gate_fc = nn.Linear(width, 1)
        self.gate_layer_norm = nn.LayerNorm(width)
        self.match_fc = nn.Linear(width, width)

    def prepare_mentions(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        return self._prepare(text_Nz, text, image_Nd, image)

    def prepare_entities(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        return self._prepare(text_Nz, text, image_Nd, image)

    @property
    def _reads_words(self) -> bool:
        return self.match_keys == "tokens"

    def _words(self, text: Ragged) -> Ragged:
        """Text tokens, rows of d."""
        return text.map_rows(self.words_fc or self.text_fc)

    @abstractmethod
    def _prepare(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        """The columns `vectors` of either side."""

    def _matches(self, own_Nd: Tensor, own: Ragged | None, other: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        """What a pooled vector finds among the other modality's P tokens, what these find of it, and their mask.

        [N, d], [N, P, d] and bool [N, P]. The pooled vector's own tokens are read by token keys alone.
        """
        other_NPd, mask_NP = other.padded()
        weights = self.match_fc.weight, self.match_fc.bias
        found_N1d = match(own_Nd[:, None], other_NPd, mask_NP, *weights)
        if own is not None and self.match_keys == "tokens":
            back_NPd = match(other_NPd, *own.padded(), *weights)
        else:
            back_NPd = match(other_NPd, own_Nd[:, None], None, *weights)
        return found_N1d[:, 0], back_NPd, mask_NP

    def _gated(self, own_Nd: Tensor, context_Nd: Tensor) -> Tensor:
        """LN(tanh(gate(own)) own + context), [N, d]."""
        gated_Nd: Tensor = self.gate_layer_norm(own_Nd * torch.tanh(self.gate_fc(own_Nd)) + context_Nd)
        return gated_Nd


class OneWayMatch(_MatchUnit):
    """Text against patches: what the text finds and what the patches find, joined by a sigmoid gate."""

    def __init__(self, text_width: int, token_width: int, width: int, match_keys: MatchKeys) -> None:
        super().__init__(text_width, token_width, width, match_keys)
        self.fusion_fc = nn.Linear(width, width)

    def _prepare(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        text_Nd = self.text_fc(text_Nz)
        words = self._words(text) if self._reads_words else None
        found_Nd, back_NPd, mask_NP = self._matches(text_Nd, words, image.map_rows(self.image_fc))
        pooled_Nd = pooled_by_temperature(back_NPd, mask_NP)
        share_Nd = torch.sigmoid(self.fusion_fc(found_Nd) + self.fusion_fc(pooled_Nd))
        return Table({"fused": self._gated(text_Nd, share_Nd * found_Nd + (1 - share_Nd) * pooled_Nd)})


class BidirectionalMatch(_MatchUnit):
    """Text against patches, and picture against text tokens: all that is found in a direction is pooled together."""

    vectors = ("text_image", "image_text")

    @property
    def _reads_words(self) -> bool:
        return True

    def _prepare(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        text_Nd, image_Nd = self.text_fc(text_Nz), self.image_fc(image_Nd)
        text, image = self._words(text), image.map_rows(self.image_fc)
        directions = ((text_Nd, text, image), (image_Nd, image, text))
        return Table({name: self._direction(*d) for name, d in zip(self.vectors, directions, strict=True)})

    def _direction(self, own_Nd: Tensor, own: Ragged, other: Ragged) -> Tensor:
        found_Nd, back_NPd, mask_NP = self._matches(own_Nd, own, other)
        all_NPd = torch.cat([found_Nd[:, None], back_NPd], dim=1)
        return self._gated(own_Nd, pooled_by_temperature(all_NPd, F.pad(mask_NP, (1, 0), value=True)))
