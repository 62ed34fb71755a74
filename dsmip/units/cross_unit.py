"""The cross unit, text and picture of one side against those of the other (MIMIC: Luo et al., KDD 2023).

Parameter names are those of the published MIMIC state dict below `matcher.cmfu`. N items, M mentions, E entities,
z global text width, d unit width. Everything is float32: call it outside autocast.
"""

from torch import Tensor, nn

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.ops.cross_unit import cross_vector


class CrossUnit(nn.Module):
    """U_C, text and picture of one side fused into one vector; the score is the dot product of two sides.

    `context_layer_norm` is in the published state dict but takes no part: it is loaded and never trained.
    """

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

    def score(self, mentions: Table, entities: Table) -> Tensor:
        """S_C, float [M, E]."""
        return mentions.dense("fused") @ entities.dense("fused").T

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, d]; products are S_C, for both sides alike."""
        return prepared.dense("fused")

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
