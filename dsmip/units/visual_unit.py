"""The visual unit, picture against picture (MIMIC: Luo et al., KDD 2023; DSMIP eq. 10).

Parameter names are those of the published MIMIC state dict below `matcher.vdlu`. N items, M mentions, E entities,
z global text width, d unit width. Everything is float32: call it outside autocast.
"""

import torch
from torch import Tensor, nn

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.ops import visual_unit as ops


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
        side = ops.query_side(self.cls_fc(global_Nd), self._weights())
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
        side = ops.value_side(self.tokens_fc(pooled_Nd), self.cls_fc(global_Nd), self._weights())
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
        a = ops.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        b = ops.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return ops.dual_unit(a, b, self._weights())

    def query_vectors(self, queries: Table) -> Tensor:
        """[A, d + 1]: `dsmip.ops.visual_unit.query_vectors`."""
        a = ops.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        return ops.query_vectors(a)

    def value_vectors(self, values: Table) -> Tensor:
        """[B, d + 1]: `dsmip.ops.visual_unit.value_vectors`."""
        b = ops.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return ops.value_vectors(b, self.layer_norm.eps)

    def _weights(self) -> ops.DualWeights:
        return ops.DualWeights(
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
    """U_V, picture against picture: the mean of both directions. Inputs are of unit width.

    All that it prepares of an item depends on the picture alone.
    """

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
        once, index_E = entities.distinct()
        ent2men_EM = self.dual_ent2men.score(once.under("ent2men"), mentions.under("ent2men"))
        men2ent_ME = self.dual_men2ent.score(mentions.under("men2ent"), once.under("men2ent"))
        scores_ME = (ent2men_EM.T + men2ent_ME) / 2
        return scores_ME if index_E is None else scores_ME[:, index_E]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, 2 d + 2]; products are S_V with its gates shut: the rest is no dot product (`dsmip.ops.visual_unit`)."""
        ent2men, men2ent = prepared.under("ent2men"), prepared.under("men2ent")
        if side == "mentions":
            blocks = self.dual_ent2men.value_vectors(ent2men), self.dual_men2ent.query_vectors(men2ent)
            return torch.cat(blocks, dim=-1) / 2
        blocks = self.dual_ent2men.query_vectors(ent2men), self.dual_men2ent.value_vectors(men2ent)
        return torch.cat(blocks, dim=-1)


def _mean_token(tokens: Ragged) -> Tensor:
    """Mean of each item's token rows [N, d]."""
    tokens_NPd, _ = tokens.padded()
    return tokens_NPd.sum(dim=1) / tokens.lengths[:, None]
