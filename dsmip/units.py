"""The three matching units and the norms of their inputs (MIMIC: Luo et al., KDD 2023; DSMIP eq. 14).

    features --prepare_mentions / prepare_entities--> Table (all that depends on one item) --score--> [M, E]

Parameter names are those of the published MIMIC state dict below `matcher.tglu`, `matcher.vdlu`, `matcher.cmfu`.
N items, M mentions, E entities, z global text width, d unit width. Everything is float32: call it outside autocast.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.errors import UserError
from dsmip.models.base import Side
from dsmip.ops import bounds, dual, matching
from dsmip.ops.kernels import cpu, cuda
from dsmip.ops.kernels.rows import TokenRows
from dsmip.rank_options import BackendName, PrecisionName
from dsmip.table import Ragged, Table

Backend = Literal["torch", "cpp", "triton"]
Precision = Literal["fp32", "fp16"]


class TextNorm(nn.Module):
    """One LayerNorm for the pooled text and one for its tokens."""

    def __init__(self, global_width: int, token_width: int) -> None:
        super().__init__()
        self.text_cls_layernorm = nn.LayerNorm(global_width)
        self.text_tokens_layernorm = nn.LayerNorm(token_width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """Same shapes and widths as given; padding is not touched."""
        return self.text_cls_layernorm(global_Nz), _each_row(tokens, self.text_tokens_layernorm)


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
        return global_Nd, _each_row(tokens, lambda x: self.image_tokens_layernorm(self.image_tokens_fc(x)))


class TextUnit(nn.Module):
    """U_T, text against text. See `dsmip.ops.matching.text_unit`.

    mask_padding: True attends over each item's own tokens. False reproduces the published code, which attends over
    padding as well: the features must then hold all token places of every item, padding included.
    backend: what computes token-level scores (`use_backend`). `cpp` (on a CPU) and `triton` (on a GPU, up to 96 tokens
    a mention) are taken for float32 without gradients, `torch` for all else. precision: see `use_precision`.
    """

    def __init__(
        self,
        global_width: int,
        token_width: int,
        width: int,
        *,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        self.mask_padding = mask_padding
        self.backend: Backend = "torch"
        self.precision: Precision = "fp32"
        self.fc_query = nn.Linear(token_width, width)
        self.fc_key = nn.Linear(token_width, width)
        self.fc_value = nn.Linear(token_width, width)
        self.fc_cls = nn.Linear(global_width, width)
        self.layer_norm = nn.LayerNorm(width)

    def prepare_mentions(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Columns `global` [N, z], ragged `key` and `value` (rows of d)."""
        self._check_lengths(tokens)
        tokens = _rows_in_use(tokens)
        key, value = _each_row(tokens, self.fc_key), _each_row(tokens, self.fc_value)
        return Table({"global": global_Nz, "key": key, "value": value})

    def prepare_entities(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Columns `global` [N, z], `local` [N, d] (W_c t_e), ragged `query` (rows of d, divided by sqrt(d))."""
        self._check_lengths(tokens)
        scale = self.fc_query.out_features**-0.5
        query = _each_row(tokens, lambda x: self.fc_query(x) * scale)
        return Table({"global": global_Nz, "local": self.fc_cls(global_Nz), "query": query})

    def with_bounds(self, mentions: Table) -> Table:
        """Prepared mentions with the column `least_norm` [M], which `at_least_ME` needs and trainings do without."""
        value_MTd, mask_MT = mentions.ragged("value").padded()
        centred_MTd = value_MTd.double() - value_MTd.double().mean(dim=-1, keepdim=True)
        return mentions.merged(Table({"least_norm": bounds.least_norm(centred_MTd, mask_MT)}))

    def score(
        self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None, at_least_ME: Tensor | None = None
    ) -> Tensor:
        """S_T, float [M, E]. The token-level half, which costs the most, is left out of pairs not wanted (bool).

        at_least_ME: float; pairs that certainly score less are not computed and get -inf (mentions `with_bounds`).
        """
        local_query_Ed = entities.dense("local")
        direction_Ed = local_query_Ed * self.layer_norm.weight

        def with_global(local_ME: Tensor) -> Tensor:
            globals_ = mentions.dense("global"), entities.dense("global")
            return matching.with_global(local_ME, *globals_, local_query_Ed, self.layer_norm.bias)

        spared_ME = None
        if at_least_ME is not None:
            spared_ME = with_global(self._local_bound(mentions, entities, direction_Ed)) < at_least_ME
            if bool(spared_ME.any()):  # all pairs at once cost less than lists of all pairs
                wanted_ME = ~spared_ME if wanted_ME is None else wanted_ME & ~spared_ME
        if self._takes_kernel(mentions, direction_Ed):
            local_ME = self._local_compiled(mentions, entities, direction_Ed, wanted_ME)
        elif wanted_ME is None:
            local_ME = self._local_torch(mentions, entities, direction_Ed)
        else:
            local_ME = self._local_of_lists(mentions, entities, direction_Ed, wanted_ME)
        scores_ME = with_global(local_ME)
        return scores_ME if spared_ME is None else scores_ME.masked_fill(spared_ME, -torch.inf)

    def _local_bound(self, mentions: Table, entities: Table, direction_Ed: Tensor) -> Tensor:
        """At least the token-level half [M, E]; NaN for entities whose tokens score NaN, so that they are computed."""
        value_MTd, mask_MT = mentions.ragged("value").padded()
        least_norm_M, eps = mentions.dense("least_norm"), self.layer_norm.eps
        bound_ME = bounds.local_bound(value_MTd, mask_MT, least_norm_M, direction_Ed, eps)
        return bound_ME.masked_fill(entities.ragged("query").not_finite(), torch.nan)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, z + 1]; products are S_T without its token-level half (the score of pairs not wanted).

        The last place carries <W_c t_e, bias of LN>, which depends on the entity alone.
        """
        global_Nz = prepared.dense("global")
        if side == "mentions":
            return F.pad(global_Nz, (0, 1), value=1.0) / 2
        bias_N = prepared.dense("local") @ self.layer_norm.bias
        return torch.cat([global_Nz, bias_N[:, None]], dim=-1)

    def _takes_kernel(self, mentions: Table, direction_Ed: Tensor) -> bool:
        if torch.is_grad_enabled() or direction_Ed.dtype != torch.float32:
            return False
        if self.backend == "triton":
            return cuda.can_score(mentions.ragged("key").lengths)
        return self.backend == "cpp" and direction_Ed.device.type == "cpu"

    def _local_compiled(
        self, mentions: Table, entities: Table, direction_Ed: Tensor, wanted_ME: Tensor | None
    ) -> Tensor:
        columns = [mentions.ragged("key"), mentions.ragged("value"), entities.ragged("query")]
        if self.backend == "triton":
            dtype = torch.float16 if self.precision == "fp16" else torch.float32
            columns = [_rows_in_use(column).cast(dtype) for column in columns]
        key, value, query = (TokenRows(column.values, column.starts, column.lengths) for column in columns)
        if self.backend == "triton":
            return cuda.local_scores(key, value, query, direction_Ed, self.layer_norm.eps, wanted_ME)
        return cpu.local_scores(key, value, query, direction_Ed, self.layer_norm.eps, wanted_ME)

    def _local_torch(self, mentions: Table, entities: Table, direction_Ed: Tensor) -> Tensor:
        key_MTd, mask_MT = mentions.ragged("key").padded()
        value_MTd, _ = mentions.ragged("value").padded()
        query_ESd, mask_ES = entities.ragged("query").padded()
        masks = (mask_MT, mask_ES) if self.mask_padding else (None, None)
        return matching.local_scores(
            key_MTd, value_MTd, masks[0], query_ESd, masks[1], direction_Ed, self.layer_norm.eps
        )

    def _local_of_lists(self, mentions: Table, entities: Table, direction_Ed: Tensor, wanted_ME: Tensor) -> Tensor:
        """`_local_torch` of each mention with its own list of entities; 0 elsewhere."""
        local_ME = direction_Ed.new_zeros(wanted_ME.shape)
        for m, wanted_E in enumerate(wanted_ME):
            row_e = wanted_E.nonzero()[:, 0]
            one = mentions.rows(slice(m, m + 1))
            local_ME[m, row_e] = self._local_torch(one, entities.rows(row_e), direction_Ed[row_e])[0]
        return local_ME

    def _check_lengths(self, tokens: Ragged) -> None:
        if not self.mask_padding and len(tokens.lengths) and bool((tokens.lengths != tokens.lengths[0]).any()):
            raise ValueError("mask_padding=False needs features that hold every token place, but lengths differ")


def use_backend(matcher: nn.Module, name: BackendName, device: torch.device) -> Backend:
    """Sets what computes the token-level scores of all text units in `matcher`; returns it.

    auto: `cpp` on a CPU and `triton` on a GPU where it can be compiled, else `torch`, with a warning that says why.

    Raises:
        UserError: `cpp` or `triton` was asked for and is not to be had.
    """
    backend: Backend = "torch"
    compiled: Backend = "cpp" if device.type == "cpu" else "triton"
    if name not in ("auto", "torch", compiled):
        place = "CPU" if name == "cpp" else "GPU"
        raise UserError(f"backend {name} runs on a {place}, not on {device}: use torch or auto")
    if name != "torch":
        reason = cpu.why_unavailable() if compiled == "cpp" else cuda.why_unavailable()
        if reason is None:
            backend = compiled
        elif name == compiled:
            raise UserError(f"backend {name} cannot be built: {reason}; mend it, or use torch")
        else:
            warnings.warn(f"no compiled kernel, scoring with PyTorch: {reason}", stacklevel=2)
    for unit in _text_units(matcher):
        unit.backend = backend
    return backend


def use_precision(matcher: nn.Module, name: PrecisionName, backend: Backend) -> Precision:
    """Sets how the text units' token rows are held while `backend` (of `use_backend`) scores them; returns it.

    fp16: in half precision, with float32 sums; prepared tables and all else stay as they are. auto: `fp16` with
    `triton`, else `fp32`.

    Raises:
        UserError: `fp16` was asked for with another backend than `triton`.
    """
    if name == "fp16" and backend != "triton":
        raise UserError(f"precision fp16 needs a GPU and backend triton, and this is {backend}: use fp32 or auto")
    precision: Precision = "fp16" if backend == "triton" and name != "fp32" else "fp32"
    for unit in _text_units(matcher):
        unit.precision = precision
    return precision


def _text_units(matcher: nn.Module) -> list[TextUnit]:
    return [module for module in matcher.modules() if isinstance(module, TextUnit)]


class DualUnit(nn.Module):
    """One direction of U_V: the pooled picture of one side against picture tokens of the other (`dsmip.ops.dual`)."""

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
        side = dual.query_side(self.cls_fc(global_Nd), self._weights())
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
        side = dual.value_side(self.tokens_fc(pooled_Nd), self.cls_fc(global_Nd), self._weights())
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
        a = dual.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        b = dual.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return dual.dual_unit(a, b, self._weights())

    def query_vectors(self, queries: Table) -> Tensor:
        """[A, d + 1]: `dsmip.ops.dual.query_vectors`."""
        a = dual.QuerySide(*(queries.dense(name) for name in ("query", "target", "mapped", "scalars")))
        return dual.query_vectors(a)

    def value_vectors(self, values: Table) -> Tensor:
        """[B, d + 1]: `dsmip.ops.dual.value_vectors`."""
        b = dual.ValueSide(*(values.dense(name) for name in ("value", "key", "mapped", "scalars")))
        return dual.value_vectors(b, self.layer_norm.eps)

    def _weights(self) -> dual.DualWeights:
        return dual.DualWeights(
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
        """S_V, float [M, E]."""
        ent2men_EM = self.dual_ent2men.score(entities.under("ent2men"), mentions.under("ent2men"))
        men2ent_ME = self.dual_men2ent.score(mentions.under("men2ent"), entities.under("men2ent"))
        return (ent2men_EM.T + men2ent_ME) / 2

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, 2 d + 2]; products are S_V with its gates shut: the rest is no dot product (`dsmip.ops.dual`)."""
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
        tokens_NPd, mask_NP = _each_row(tokens, self.image_fc).padded()
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


def _rows_in_use(tokens: Ragged) -> Ragged:
    """The same items without the token rows that none of them uses (a slice of a large table shares all its rows)."""
    return tokens.compact() if len(tokens.values) > int(tokens.lengths.sum()) else tokens


def _each_row(tokens: Ragged, transform: Callable[[Tensor], Tensor]) -> Ragged:
    """`transform` applied once to every token row in use."""
    tokens = _rows_in_use(tokens)
    return Ragged(transform(tokens.values), tokens.starts, tokens.lengths)


def _mean_token(tokens: Ragged) -> Tensor:
    """Mean of each item's token rows [N, d]."""
    tokens_NPd, _ = tokens.padded()
    return tokens_NPd.sum(dim=1) / tokens.lengths[:, None]
