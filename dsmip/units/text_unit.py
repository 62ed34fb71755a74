"""The text unit and what computes its token-level half: PyTorch, or a compiled kernel (`dsmip.ops.kernels`).

Parameter names are those of the published MIMIC state dict below `matcher.tglu`. N items, M mentions, E entities, z
global text width, d unit width. Everything is float32, or all of it float64: call it outside autocast.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.errors import UserError
from dsmip.ops import text_unit as ops
from dsmip.ops.kernels import cpu, cuda
from dsmip.ops.kernels.rows import TokenRows
from dsmip.rank_options import BackendName, PrecisionName
from dsmip.units import text_unit_library

Backend = Literal["torch", "cpp", "triton"]
Precision = Literal["fp32", "fp16"]


# less than the largest number: centring may double a value
_LARGEST_IN_HALF = torch.finfo(torch.float16).max / 2


class HalfOverflow(ValueError):
    """Token rows hold numbers that half precision does not: score them with precision fp32."""

    def __init__(self, largest: float) -> None:
        super().__init__(f"token rows hold numbers up to {largest:.3g}, too large for half precision")


class TextUnit(nn.Module):
    """U_T, text against text. See `dsmip.ops.text_unit`.

    Attributes:
        mask_padding: True attends over each item's own tokens. False reproduces the published code, which attends over
            padding as well: the features must then hold all token places of every item, padding included.
        backend: What computes token-level scores (`use_backend`), where there are no gradients: `cpp` on a CPU, for
            float32 and float64, and `triton` on a GPU, for float32 and up to 96 tokens a mention; `torch` for all else.
        precision: See `use_precision`.
    """

    def __init__(
        self,
        global_width: int,
        token_width: int,
        width: int,
        *,
        mask_padding: bool = True,
        query_width: int | None = None,
    ) -> None:
        """
        Args:
            token_width: Of mentions' tokens, and of entities' unless `query_width` says otherwise.
        """
        super().__init__()
        self.mask_padding = mask_padding
        self.backend: Backend = "torch"
        self.precision: Precision = "fp32"
        self.fc_query = nn.Linear(query_width or token_width, width)
        self.fc_key = nn.Linear(token_width, width)
        self.fc_value = nn.Linear(token_width, width)
        self.fc_cls: nn.Module = nn.Linear(global_width, width)
        self.layer_norm = nn.LayerNorm(width)

    def prepare_mentions(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Columns `global` [N, z], ragged `key` and `value` (rows of d)."""
        self._check_lengths(tokens)
        tokens = tokens.in_use()
        key, value = tokens.map_rows(self.fc_key), tokens.map_rows(self.fc_value)
        return Table({"global": global_Nz, "key": key, "value": value})

    def prepare_entities(self, global_Nz: Tensor, tokens: Ragged) -> Table:
        """Columns `global` [N, z], `local` [N, d] (W_c t_e), ragged `query` (rows of d, divided by sqrt(d))."""
        self._check_lengths(tokens)
        scale = self.fc_query.out_features**-0.5
        query = tokens.map_rows(lambda x: self.fc_query(x) * scale)
        return Table({"global": global_Nz, "local": self.fc_cls(global_Nz), "query": query})

    def score(self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None) -> Tensor:
        """S_T, float [M, E]. The token-level half, which costs the most, is left out of pairs not wanted (bool).

        Raises:
            HalfOverflow: Token rows too large for precision fp16.
        """
        local_query_Ed = entities.dense("local")
        direction_Ed = local_query_Ed * self.layer_norm.weight
        if self._takes_kernel(mentions, direction_Ed):
            local_ME = self._local_compiled(mentions, entities, direction_Ed, wanted_ME)
        elif wanted_ME is None:
            local_ME = self._local_torch(mentions, entities, direction_Ed)
        else:
            local_ME = self._local_of_lists(mentions, entities, direction_Ed, wanted_ME)
        globals_ = mentions.dense("global"), entities.dense("global")
        return ops.with_global(local_ME, *globals_, local_query_Ed, self.layer_norm.bias)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """[N, z + 1]; products are S_T without its token-level half (the score of pairs not wanted).

        The last number is <W_c t_e, bias of LN>, which depends on the entity alone.
        """
        global_Nz = prepared.dense("global")
        if side == "mentions":
            return F.pad(global_Nz, (0, 1), value=1.0) / 2
        bias_N = prepared.dense("local") @ self.layer_norm.bias
        return torch.cat([global_Nz, bias_N[:, None]], dim=-1)

    def _takes_kernel(self, mentions: Table, direction_Ed: Tensor) -> bool:
        if torch.is_grad_enabled():
            return False
        if self.backend == "triton":
            return direction_Ed.dtype == torch.float32 and cuda.can_score(mentions.ragged("key").lengths)
        on_cpu = direction_Ed.device.type == "cpu" and direction_Ed.dtype in (torch.float32, torch.float64)
        return self.backend == "cpp" and on_cpu

    def _local_compiled(
        self, mentions: Table, entities: Table, direction_Ed: Tensor, wanted_ME: Tensor | None
    ) -> Tensor:
        columns = [mentions.ragged("key"), mentions.ragged("value"), entities.ragged("query")]
        if self.backend == "triton":
            columns = [column.in_use() for column in columns]
            if self.precision == "fp16":
                columns = [_in_half(column) for column in columns]
        key, value, query = (TokenRows(column.values, column.starts, column.lengths) for column in columns)
        if self.backend == "triton":
            return cuda.local_scores(key, value, query, direction_Ed, self.layer_norm.eps, wanted_ME)
        return cpu.local_scores(
            text_unit_library.library(), key, value, query, direction_Ed, self.layer_norm.eps, wanted_ME
        )

    def _local_torch(self, mentions: Table, entities: Table, direction_Ed: Tensor) -> Tensor:
        key_MTd, mask_MT = mentions.ragged("key").padded()
        value_MTd, _ = mentions.ragged("value").padded()
        query_ESd, mask_ES = entities.ragged("query").padded()
        masks = (mask_MT, mask_ES) if self.mask_padding else (None, None)
        return ops.local_scores(key_MTd, value_MTd, masks[0], query_ESd, masks[1], direction_Ed, self.layer_norm.eps)

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


def _in_half(column: Ragged) -> Ragged:
    """The rows in float16; what is not finite stays so, and makes scores of its item alone NaN."""
    magnitude = column.values.abs()
    if magnitude.numel() and (largest := float(magnitude.where(magnitude.isfinite(), 0.0).max())) > _LARGEST_IN_HALF:
        raise HalfOverflow(largest)
    return column.cast(torch.float16)


def check_backend(name: BackendName, precision: PrecisionName, device: torch.device) -> None:
    """What can be known of these choices before anything is compiled.

    Raises:
        UserError: The device is none for the backend, or the precision none for the device.
    """
    compiled: Backend = "cpp" if device.type == "cpu" else "triton"
    if name not in ("auto", "torch", compiled):
        processor = "CPU" if name == "cpp" else "GPU"
        raise UserError(f"backend {name} runs on a {processor}, not on {device}: use torch or auto")
    if precision == "fp16" and (device.type == "cpu" or name == "torch"):
        backend = "torch" if name == "torch" else compiled
        raise UserError(f"precision fp16 needs a GPU and backend triton, and this is {backend}: use fp32 or auto")


def use_backend(matcher: nn.Module, name: BackendName, device: torch.device) -> Backend:
    """Sets what computes the token-level scores of all text units in `matcher`; returns it.

    auto: `cpp` on a CPU and `triton` on a GPU where it can be compiled, else `torch`, with a warning that says why.

    Raises:
        UserError: `cpp` or `triton` was asked for and is not to be had.
    """
    check_backend(name, "auto", device)
    backend: Backend = "torch"
    compiled: Backend = "cpp" if device.type == "cpu" else "triton"
    if name != "torch":
        reason = text_unit_library.why_unavailable() if compiled == "cpp" else cuda.why_unavailable()
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
