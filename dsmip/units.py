"""The picture units and the norms of all units' inputs (MIMIC: Luo et al., KDD 2023; DSMIP eq. 14).

    features --prepare_mentions / prepare_entities--> Table (all that depends on one item) --score--> [M, E]

Parameter names are those of the published MIMIC state dict below `matcher.vdlu`, `matcher.cmfu`; the text
unit has a file of its own.
N items, M mentions, E entities, z global text width, d unit width. Everything is float32: call it outside autocast.
"""

import torch
from torch import Tensor, nn

from dsmip.models.base import Side
from dsmip.ops import matching, visual_unit
from dsmip.table import Ragged, Table


class TextNorm(nn.Module):
    """One LayerNorm for the pooled text and one for its tokens."""

    def __init__(self, global_width: int, token_width: int) -> None:
        super().__init__()
        self.text_cls_layernorm = nn.LayerNorm(global_width)
        self.text_tokens_layernorm = nn.LayerNorm(token_width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """Same shapes and widths as given; padding is not touched."""
        return self.text_cls_layernorm(global_Nz), tokens.map_rows(self.text_tokens_layernorm)


class PictureNorm(nn.Module):
    """Maps pooled picture and picture tokens to the unit width, then one LayerNorm each."""

    def __init__(self, global_width: int, token_width: int, width: int) -> None:
        super().__init__()
        self.image_cls_fc = nn.Linear(global_width, width)
        self.image_tokens_fc = nn.Linear(token_width, width)
        self.image_cls_layernorm = nn.LayerNorm(width)
        self.image_tokens_layernorm = nn.LayerNorm(width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """([N, d], ragged rows of d)."""
        global_Nd = self.image_cls_layernorm(self.image_cls_fc(global_Nz))
        return global_Nd, tokens.map_rows(lambda x: self.image_tokens_layernorm(self.image_tokens_fc(x)))


class DualUnit(nn.Module):
    """One direction of U_V: one side's pooled picture against the other's tokens (`dsmip.ops.visual_unit`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_fc = nn.Linear(width, width)
        self.tokens_fc = nn.Linear(width, width)
        self.fc = nn.Linear(width, width)
        self.gate_fc = nn.Linear(width, 1)
        self.add_layer_norm = nn.LayerNorm(width)
        self.layer_norm = nn.LayerNorm(width)

    def prepare_query(self, global_Nd: Tensor) -> Table:
        """Columns `query`, `target`, `mapped` [N, d] and `scalars` [N, 7] of the query side."""
        side = visual_unit.query_side(self.cls_fc(global_Nd), self._weights())
        return Table(
            {
                "query": side.query_Ad,
                "target": side.target_Ad,
                "mapped": side.mapped_Ad,
                "scalars": side.scalars_A7,
            }
        )

    def prepare_value(self, global_Nd: Tensor, pooled_Nd: Tensor) -> Table:
        """Columns `value`, `key`, `mapped` [N, d] and `scalars` [N, 7]; pooled_Nd is the mean of the picture tokens."""
        side = visual_unit.value_side(self.tokens_fc(pooled_Nd), self.cls_fc(global_Nd), self._weights())
        return Table(
            {
                "value": side.value_Bd,
                "key": side.key_Bd,
                "mapped": side.mapped_Bd,
                "scalars": side.scalars_B7,
            }
        )

    def score(self, queries: Table, values: Table) -> Tensor:
        """Query side [A] against value side [B]: float [A, B]."""
        a = visual_unit.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        b = visual_unit.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return visual_unit.dual_unit(a, b, self._weights())

    def query_vectors(self, queries: Table) -> Tensor:
        """[A, d + 1]: `dsmip.ops.visual_unit.query_vectors`."""
        a = visual_unit.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        return visual_unit.query_vectors(a)

    def value_vectors(self, values: Table) -> Tensor:
        """[B, d + 1]: `dsmip.ops.visual_unit.value_vectors`."""
        b = visual_unit.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return visual_unit.value_vectors(b, self.layer_norm.eps)

    def _weights(self) -> visual_unit.DualWeights:
        return visual_unit.DualWeights(
            self.add_layer_norm.weight,
            self.add_layer_norm.bias,
            self.fc.weight,
            self.fc.bias,
            self.gate_fc.weight[0],
            self.gate_fc.bias[0],
            self.layer_norm.weight,
            self.layer_norm.bias,
            self.layer_norm.eps,
        )


class VisualUnit(nn.Module):
    """U_V, picture against picture: the mean of both directions. Inputs are of unit width (`PictureNorm`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dual_ent2men = DualUnit(width)
        self.dual_men2ent = DualUnit(width)

    def prepare_mentions(self, global_Nd: Tensor, tokens: Ragged) -> Table:
        """Columns `ent2men.*` (value side) and `men2ent.*` (query side) of `DualUnit`."""
        values = self.dual_ent2men.prepare_value(global_Nd, _mean_token(tokens))
        return values.prefixed("ent2men").merged(self.dual_men2ent.prepare_query(global_Nd).prefixed("men2ent"))

    def prepare_entities(self, global_Nd: Tensor, tokens: Ragged) -> Table:
        """Columns `ent2men.*` (query side) and `men2ent.*` (value side) of `DualUnit`."""
        values = self.dual_men2ent.prepare_value(global_Nd, _mean_token(tokens))
        return values.prefixed("men2ent").merged(self.dual_ent2men.prepare_query(global_Nd).prefixed("ent2men"))

    def score(self, mentions: Table, entities: Table) -> Tensor:
        """S_V, float [M, E]. Entities that are known to be equal are scored once: they tie to the last bit."""
        once, place_E = entities.distinct()
        ent2men_EM = self.dual_ent2men.score(once.under("ent2men"), mentions.under("ent2men"))
        men2ent_ME = self.dual_men2ent.score(mentions.under("men2ent"), once.under("men2ent"))
        scores_ME = (ent2men_EM.T + men2ent_ME) / 2
        return scores_ME if place_E is None else scores_ME[:, place_E]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, 2 d + 2]; products are S_V with its gates shut: the rest is no dot product (`dsmip.ops.visual_unit`)."""
        ent2men, men2ent = prepared.under("ent2men"), prepared.under("men2ent")
        if side == "mentions":
            blocks = self.dual_ent2men.value_vectors(ent2men), self.dual_men2ent.query_vectors(men2ent)
            return torch.cat(blocks, dim=-1) / 2
        blocks = self.dual_ent2men.query_vectors(ent2men), self.dual_men2ent.value_vectors(men2ent)
        return torch.cat(blocks, dim=-1)


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
        fused_Nd = matching.cross_vector(
            self.text_fc(global_Nz),
            tokens_NPd,
            mask_NP,
            *gate,
            norm.weight,
            norm.bias,
            norm.eps,
        )
        return Table({"fused": fused_Nd})


def _mean_token(tokens: Ragged) -> Tensor:
    """Mean of each item's token rows [N, d]."""
    tokens_NPd, _ = tokens.padded()
    return tokens_NPd.sum(dim=1) / tokens.lengths[:, None]
