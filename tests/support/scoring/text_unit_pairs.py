"""Prepared pairs for every backend of the text unit, with a slow float64 twin of their scores."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmip.data.table import Column, Ragged, Table
from dsmip.ops.kernels.rows import TokenRows
from dsmip.units.text_unit import Backend, Precision, TextUnit, use_backend, use_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = {"triton": CPU if INTERPRETED else torch.device("cuda")}
GLOBAL_WIDTH = 3


@dataclass(frozen=True)
class Way:
    """What scores, in which precision it holds token rows, and the numbers that it is given."""

    backend: Backend
    precision: Precision = "fp32"
    dtype: torch.dtype = torch.float32

    @property
    def atol(self) -> float:
        """Of scores that spread by the square root of the width, 5 at most."""
        if self.dtype == torch.float64:
            return 1e-12
        return 2e-2 if self.precision == "fp16" else 3e-5

    @property
    def device(self) -> torch.device:
        return DEVICE.get(self.backend, CPU)


@dataclass(frozen=True)
class Pairs:
    """A text unit with prepared mentions and entities, on the CPU."""

    unit: TextUnit
    mentions: Table
    entities: Table

    def of_kernel(self) -> tuple[TokenRows, TokenRows, TokenRows, Tensor]:
        """Keys, values, queries and directions, as a kernel takes them."""
        columns = self.mentions.ragged("key"), self.mentions.ragged("value"), self.entities.ragged("query")
        key, value, query = (TokenRows(each.values, each.starts, each.lengths) for each in columns)
        return key, value, query, self.entities.dense("local")

    def scores(self, way: Way, wanted_ME: Tensor | None = None) -> Tensor:
        """Of the backend, float64 on the CPU."""
        if INTERPRETED:
            self.unit.backend = "triton"  # on CPU tensors, which `use_backend` refuses
        else:
            assert use_backend(self.unit, way.backend, way.device) == way.backend
        assert use_precision(self.unit, way.precision, way.backend) == way.precision
        mentions, entities = (side.to(way.device).cast(way.dtype) for side in (self.mentions, self.entities))
        wanted_ME = None if wanted_ME is None else wanted_ME.to(way.device)
        with torch.no_grad():
            scores_ME = self.unit.to(way.device, way.dtype).score(mentions, entities, wanted_ME)
        self.unit.to(CPU, torch.float32)
        assert scores_ME.dtype == way.dtype
        return scores_ME.double().cpu()

    def twin(self, wanted_ME: Tensor | None = None) -> Tensor:
        """Pair by pair, as the paper says it: float64 [M, E]; without the token-level half where not wanted."""
        unit, found_ME = self.unit, torch.zeros(len(self.mentions), len(self.entities), dtype=torch.float64)
        weight, bias = unit.layer_norm.weight.detach().double(), unit.layer_norm.bias.detach().double()
        keys, values = own_rows(self.mentions.ragged("key")), own_rows(self.mentions.ragged("value"))
        queries = own_rows(self.entities.ragged("query"))
        global_Mz, global_Ez = self.mentions.dense("global").double(), self.entities.dense("global").double()
        for m, e in itertools.product(range(len(self.mentions)), range(len(self.entities))):
            local = self.entities.dense("local")[e].double()
            total = global_Mz[m] @ global_Ez[e] + local @ bias
            if wanted_ME is None or bool(wanted_ME[m, e]):
                context = torch.softmax(queries[e] @ keys[m].T, dim=1).mean(dim=0) @ values[m]
                centred = context - context.mean()
                total = total + (local * weight) @ centred / (centred.square().mean() + unit.layer_norm.eps).sqrt()
            found_ME[m, e] = total / 2
        return found_ME

    def assert_equal(self, way: Way, wanted_ME: Tensor | None = None, atol: float | None = None) -> None:
        found_ME, expected_ME = self.scores(way, wanted_ME), self.twin(wanted_ME)
        torch.testing.assert_close(
            found_ME, expected_ME, atol=way.atol if atol is None else atol, rtol=0, equal_nan=True
        )


def own_rows(column: Ragged) -> list[Tensor]:
    spans = zip(column.starts.tolist(), column.lengths.tolist(), strict=True)
    return [column.values[start : start + length].double() for start, length in spans]


def rows(num_tokens: list[int], width: int, generator: torch.Generator, scale: float = 1.0) -> Ragged:
    """Token rows in any order, with rows in between that belong to no item."""
    length_N = torch.tensor(num_tokens)
    order_N = torch.randperm(len(num_tokens), generator=generator)
    start_N = torch.empty_like(length_N)
    start_N[order_N] = 3 + (length_N[order_N] + 2).cumsum(0) - (length_N[order_N] + 2)
    values_Rd = scale * torch.randn(int((length_N + 2).sum()) + 3, width, generator=generator)
    return Ragged(values_Rd, start_N, length_N)


def pairs(
    way: Way, mention_lengths: list[int], entity_lengths: list[int], width: int = 16, scale: float | None = None
) -> Pairs:
    """scale: of queries and keys; by default logits spread by 1."""
    generator = torch.Generator().manual_seed(sum(mention_lengths) + 7 * width)
    scale = width**-0.25 if scale is None else scale
    unit = TextUnit(GLOBAL_WIDTH, 1, width)
    unit.layer_norm.eps = 1e-3  # with the usual 1e-5 contexts near 0, of few channels, would enlarge errors
    with torch.no_grad():
        for parameter in (unit.layer_norm.weight, unit.layer_norm.bias):
            parameter.copy_(torch.randn(width, generator=generator))
    key = rows(mention_lengths, width, generator, scale)
    value = rows(mention_lengths, width, generator)
    query = rows(entity_lengths, width, generator, scale)

    def normal(count: int, size: int) -> Tensor:
        return torch.randn(count, size, generator=generator)

    mentions = Table({"global": normal(len(mention_lengths), GLOBAL_WIDTH), "key": key, "value": value})
    num_entities = len(entity_lengths)
    entities: dict[str, Column] = {
        "global": normal(num_entities, GLOBAL_WIDTH),
        "local": normal(num_entities, width),
        "query": query,
    }
    return as_seen(way, Pairs(unit, mentions, Table(entities)))


def changed(case: Pairs, change: Callable[[Ragged], Ragged]) -> Pairs:
    """The same with other ragged columns."""
    sides = []
    for table in (case.mentions, case.entities):
        ragged = {name: change(column) for name, column in table.columns.items() if isinstance(column, Ragged)}
        sides.append(table.merged(Table(ragged)))
    return replace(case, mentions=sides[0], entities=sides[1])


def as_seen(way: Way, exact: Pairs) -> Pairs:
    """Token rows rounded to the way's precision, so that the twin starts from the same numbers."""
    if way.precision == "fp32":
        return exact
    return changed(exact, lambda column: column.cast(torch.float16).cast(torch.float32))
