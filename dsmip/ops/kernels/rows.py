"""Rows that the compiled text units score, checked before: a kernel itself does not look where it reads.

M mentions, E entities, N items of either side, R token rows, d unit width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenRows(NamedTuple):
    """N items' token rows in one float tensor [R, d]: item n owns rows starts[n] to starts[n] + lengths[n]."""

    values_Rd: Tensor
    start_N: Tensor
    length_N: Tensor


class Pairs(NamedTuple):
    """All mentions against all entities.

    Attributes:
        key, value: Of the mentions.
        query: Of the entities.
        direction_Ed: Of the entities, float64 beside rows of float64, else float32.
        wanted_ME: The pairs that are scored, bool; None: all.
    """

    key: TokenRows
    value: TokenRows
    query: TokenRows
    direction_Ed: Tensor
    wanted_ME: Tensor | None

    @property
    def num_mentions(self) -> int:
        return len(self.key.length_N)

    @property
    def num_entities(self) -> int:
        return len(self.query.length_N)

    @property
    def width(self) -> int:
        return self.key.values_Rd.shape[1]


def checked(pairs: Pairs, device_type: str, dtypes: Sequence[torch.dtype]) -> Pairs:
    """The same without gradients, contiguous and safe to read.

    Raises:
        ValueError: another dtype, device or shape than a kernel takes, or rows outside their tensor.
    """
    key, value, query = (_checked_rows(rows, device_type, dtypes) for rows in (pairs.key, pairs.value, pairs.query))
    if len({rows.values_Rd.dtype for rows in (key, value, query)}) > 1:
        raise ValueError("keys, values and queries must be of one dtype")
    if not torch.equal(key.length_N, value.length_N):
        raise ValueError("keys and values differ in their numbers of tokens")
    direction_Ed, wanted_ME = pairs.direction_Ed.detach().contiguous(), pairs.wanted_ME
    num_mentions, num_entities, width = pairs.num_mentions, pairs.num_entities, pairs.width
    shapes = (value.values_Rd.shape[1], query.values_Rd.shape[1], *direction_Ed.shape)
    dtype = torch.promote_types(torch.float32, key.values_Rd.dtype)
    if shapes != (width, width, num_entities, width) or direction_Ed.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"directions must be {name} [E, d], and keys, values and queries of the same width d")
    if wanted_ME is not None:
        if wanted_ME.shape != (num_mentions, num_entities) or wanted_ME.dtype != torch.bool:
            raise ValueError("wanted pairs must be bool [M, E]")
        wanted_ME = wanted_ME.contiguous()
    return Pairs(key, value, query, direction_Ed, wanted_ME)


def _checked_rows(rows: TokenRows, device_type: str, dtypes: Sequence[torch.dtype]) -> TokenRows:
    values_Rd = rows.values_Rd.detach().contiguous()
    if values_Rd.dtype not in dtypes or values_Rd.device.type != device_type or values_Rd.dim() != 2:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"token rows must be {names} [R, d] on the {'CPU' if device_type == 'cpu' else 'GPU'}")
    start_N, length_N = (x.to(torch.int64).contiguous() for x in (rows.start_N, rows.length_N))
    inside_N = (start_N >= 0) & (length_N >= 0) & (start_N + length_N <= len(values_Rd))
    if len(start_N) != len(length_N) or not bool(inside_N.all()):
        raise ValueError(f"items own token rows outside of the {len(values_Rd)} that there are")
    return TokenRows(values_Rd, start_N, length_N)
