"""The cross unit, text and picture of one side against those of the other (MIMIC: Luo et al., KDD 2023).

Parameter names are those of the published MIMIC state dict below `matcher.cmfu`. N items, M mentions, E entities,
z global text width, d unit width. Everything is float32: call it outside autocast.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.ops.cross_unit import cross_vector


class FusedUnit(nn.Module, ABC):
    """A unit that fuses text and picture of an item into vectors: scores are dot products of two sides.

    Attributes:
        reads: What `prepare_*` takes, in order, of text_global, text_tokens, image_global and image_tokens, as they
            come from the norms.
        vectors: Columns that `prepare_*` makes, float [N, .]; each gives one score.
    """

    reads: ClassVar[tuple[str, ...]]
    vectors: ClassVar[tuple[str, ...]] = ("fused",)

    @abstractmethod
    def prepare_mentions(self, *inputs: Any) -> Table:
        """The columns `vectors` of N mentions."""

    @abstractmethod
    def prepare_entities(self, *inputs: Any) -> Table:
        """The columns `vectors` of N entities."""

    def scores(self, mentions: Table, entities: Table) -> Sequence[Tensor]:
        """One score [M, E] for each of `vectors`."""
        return [mentions.dense(name) @ entities.dense(name).T for name in self.vectors]

    def score(self, mentions: Table, entities: Table) -> Tensor:
        """The mean of `scores`, float [M, E]."""
        scores = self.scores(mentions, entities)
        return scores[0] if len(scores) == 1 else torch.stack(list(scores)).mean(dim=0)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """All `vectors` side by side; products are the sum of `scores`, for both sides alike."""
        return torch.cat([prepared.dense(name) for name in self.vectors], dim=-1)


def words_map(text_width: int, token_width: int, width: int) -> nn.Linear | None:
    """A map of text tokens to `width` where they are not as wide as pooled texts; None: the map of those has both.

    As published both are 512 wide, and one map is for both.
    """
    return None if token_width == text_width else nn.Linear(token_width, width)


class CrossUnit(FusedUnit):
    """U_C, text and picture of one side fused into one vector; the score is the dot product of two sides.

    `context_layer_norm` is in the published state dict but takes no part: it is loaded and never trained.
    """

    reads = ("text_global", "image_tokens")

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.text_fc = nn.Linear(text_width, width)
        self.image_fc = nn.Linear(width, width)
        self.gate_fc = nn.Linear(width, 1)
        self.gate_layer_norm = nn.LayerNorm(width)
        self.context_layer_norm = nn.LayerNorm(width).requires_grad_(False)

    def prepare_mentions(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Column `fused` [N, d] of pooled texts and picture tokens of unit width."""
        return self._prepare(global_Nz, tokens)

    def prepare_entities(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Column `fused` [N, d] of pooled texts and picture tokens of unit width."""
        return self._prepare(global_Nz, tokens)

    def _prepare(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        tokens_NPd, mask_NP = tokens.map_rows(self.image_fc).padded()
        norm = self.gate_layer_norm
        gate = (self.gate_fc.weight, self.gate_fc.bias)
        fused_Nd = cross_vector(
            self.text_fc(global_Nz),
            tokens_NPd,
            mask_NP,
            *gate,
            norm.weight,
            norm.bias,
            norm.eps,
        )
        return Table({"fused": fused_Nd})
