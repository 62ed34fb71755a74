"""The mixture of experts and MMoE's units over it: text and picture units of mixed tokens, and the cross unit.

N items, S places of a sequence, z width of pooled texts, d unit width. Everything is float32: call it outside autocast.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.ops.cross_unit import attended
from dsmip.ops.mixture import gates_as_published, gates_per_token
from dsmip.units.cross_unit import FusedUnit, words_map
from dsmip.units.text_unit import TextUnit

GateName = Literal["per_token", "published"]


class Mixture(nn.Module):
    """Experts [w -> 4 w -> d], each a share of every token's output; `top_k` of them are kept.

    Attributes:
        gate: `per_token`, or `published` (`dsmip.ops.mixture`): what an item becomes then depends on its batch.
    """

    def __init__(self, input_width: int, width: int, num_experts: int, top_k: int, gate: GateName) -> None:
        super().__init__()
        self.input_width, self.top_k, self.gate = input_width, top_k, gate
        hidden = 4 * input_width
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(input_width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(num_experts)
        )
        self.gate_fc = nn.Linear(input_width, num_experts)

    def forward(self, tokens: Tensor, gated_by: Tensor | None = None) -> Tensor:
        """Tokens [..., w] to [..., d].

        Args:
            tokens: [N, S, w] with the gate `published`.
            gated_by: Of the same shape, what the gate sees (default: the tokens).
        """
        logits = self.gate_fc(tokens if gated_by is None else gated_by)
        if self.gate == "per_token":
            return self._mixed(tokens, gates_per_token(logits, self.top_k))
        gates, alive = gates_as_published(logits, self.top_k), len(self.experts)  # places behind these have no share
        return F.pad(self._mixed(tokens[:, :alive], gates[:, :alive]), (0, 0, 0, max(tokens.shape[1] - alive, 0)))

    def _mixed(self, tokens: Tensor, gates: Tensor) -> Tensor:
        mixed: Tensor = gates[..., :1] * self.experts[0](tokens)
        for number in range(1, len(self.experts)):
            mixed = mixed + gates[..., number : number + 1] * self.experts[number](tokens)
        return mixed

    def of_item(self, pooled_Nw: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """The sequence [pooled; tokens] of each item: [N, d], and rows of d."""
        if self.gate == "per_token":
            return self(pooled_Nw), tokens.map_rows(self)
        mixed_NSd = self(torch.cat([pooled_Nw[:, None], tokens.padded()[0]], dim=1))
        return mixed_NSd[:, 0], Ragged.from_padded(mixed_NSd[:, 1:])


class MixedTokensUnit(TextUnit):
    """MIMIC's text unit over mixed tokens; W_c t_e is the mixture's pooled output, <t_m, t_e> is as given."""

    def __init__(self, mixture: Mixture, token_width: int, width: int) -> None:
        """The mixture is of pooled vectors; tokens of another `token_width` are mapped to theirs first."""
        super().__init__(width, width, width, mask_padding=False)
        self.fc_cls = nn.Identity()
        self.words_fc = words_map(mixture.input_width, token_width, mixture.input_width)
        self.mixture = mixture

    def prepare_mentions(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        prepared = super().prepare_mentions(*self._mixed(global_Nz, tokens))
        return prepared.merged(Table({"global": global_Nz}))

    def prepare_entities(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        prepared = super().prepare_entities(*self._mixed(global_Nz, tokens))
        return prepared.merged(Table({"global": global_Nz}))

    def _mixed(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        return self.mixture.of_item(global_Nz, tokens.map_rows(self.words_fc) if self.words_fc else tokens)


class MixedCrossUnit(FusedUnit):
    """Text over patches and picture over text tokens by one mixture, each gated by the other; the mean of both dots.

    The gate of [text pooled; patches] sees [picture pooled; text tokens] place by place, and the other way round. Where
    a side has fewer places than the other, its pooled vector stands for those that it lacks (as published both have
    50). `context_layer_norm` is in the published state dict but takes no part: it is loaded and never trained.
    """

    reads = ("text_global", "text_tokens", "image_global", "image_tokens")

    def __init__(self, mixture: Mixture, text_width: int, token_width: int, width: int) -> None:
        super().__init__()
        self.words_fc = words_map(text_width, token_width, width)
        self.text_fc = nn.Linear(text_width, width)
        self.image_fc = nn.Linear(width, width)
        self.gate_fc = nn.Linear(width, 1)
        self.gate_layer_norm = nn.LayerNorm(width)
        self.context_layer_norm = nn.LayerNorm(width).requires_grad_(False)
        self.mixture = mixture

    def prepare_mentions(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        """Column `fused` [N, 2 d]; what is kept of a pooled vector depends on itself."""
        return self._prepare(text_Nz, text, image_Nd, image, "mentions")

    def prepare_entities(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged) -> Table:
        """Column `fused` [N, 2 d]; what is kept of a pooled vector depends on its context."""
        return self._prepare(text_Nz, text, image_Nd, image, "entities")

    def _prepare(self, text_Nz: Tensor, text: Ragged, image_Nd: Tensor, image: Ragged, side: Side) -> Table:
        patches_NPd, words_NTd = (
            image.map_rows(self.image_fc).padded()[0],
            text.map_rows(self.words_fc or self.text_fc).padded()[0],
        )
        text_NSd = torch.cat([self.text_fc(text_Nz)[:, None], patches_NPd], dim=1)
        image_NSd = torch.cat([self.image_fc(image_Nd)[:, None], words_NTd], dim=1)
        halves = self._fused(text_NSd, image_NSd, side), self._fused(image_NSd, text_NSd, side)
        return Table({"fused": torch.cat(halves, dim=-1) / 2**0.5})

    def _fused(self, own_NSd: Tensor, other_NSd: Tensor, side: Side) -> Tensor:
        """LN(tanh(gate) pooled + context), [N, d]; the context is attention of the mixed pooled vector."""
        mixed_NSd = self.mixture(own_NSd, _of_length(other_NSd, own_NSd.shape[1]))
        context_Nd = attended(mixed_NSd[:, 0], mixed_NSd[:, 1:])
        pooled_Nd = own_NSd[:, 0]
        gate_N1 = torch.tanh(self.gate_fc(pooled_Nd if side == "mentions" else context_Nd))
        fused_Nd: Tensor = self.gate_layer_norm(gate_N1 * pooled_Nd + context_Nd)
        return fused_Nd


def _of_length(sequence_NSd: Tensor, length: int) -> Tensor:
    """The sequence's first places; places that it lacks have its first token."""
    lacking = length - sequence_NSd.shape[1]
    if lacking <= 0:
        return sequence_NSd[:, :length]
    return torch.cat([sequence_NSd, sequence_NSd[:, :1].expand(-1, lacking, -1)], dim=1)
