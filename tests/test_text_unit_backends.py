"""Every backend of the text unit under the same tests: its scores are those of a slow twin in float64.

Triton runs here on a GPU; `tests/test_kernels_cuda.py` runs this file once more in Triton's interpreter, where no other
backend is asked again.
"""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.kernels import cpu
from dsmip.ops.kernels.rows import TokenRows
from dsmip.table import Ragged, Table
from dsmip.text_unit import Backend, Precision, TextUnit, use_backend, use_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = {"triton": CPU if INTERPRETED else torch.device("cuda")}
ATOL = {"fp32": 3e-5, "fp16": 2e-2}  # of scores that spread by the square root of the width, 5 at most
GLOBAL_WIDTH = 3

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@dataclass(frozen=True)
class Way:
    """What scores, and in which precision it holds token rows."""

    backend: Backend
    precision: Precision = "fp32"

    @property
    def device(self) -> torch.device:
        return DEVICE.get(self.backend, CPU)


@pytest.fixture(
    scope="module",
    params=[Way("torch"), Way("cpp"), Way("triton"), Way("triton", "fp16")],
    ids=lambda w: f"{w.backend}-{w.precision}",
)
def way(request: pytest.FixtureRequest) -> Way:
    asked: Way = request.param
    if INTERPRETED and asked.backend != "triton":
        pytest.skip("asked in the process without the interpreter")
    if asked.backend == "triton" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU at hand")
    if asked.backend == "cpp" and (reason := cpu.why_unavailable()) is not None:
        pytest.skip(reason)
    return asked


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

    def scores(self, way: Way, wanted_ME: Tensor | None = None, at_least_ME: Tensor | None = None) -> Tensor:
        """Of the backend, on the CPU."""
        if INTERPRETED:
            self.unit.backend = "triton"  # on CPU tensors, which `use_backend` refuses
        else:
            assert use_backend(self.unit, way.backend, way.device) == way.backend
        assert use_precision(self.unit, way.precision, way.backend) == way.precision
        sides = self.mentions.to(way.device), self.entities.to(way.device)
        masks = (None if mask is None else mask.to(way.device) for mask in (wanted_ME, at_least_ME))
        with torch.no_grad():
            scores_ME = self.unit.to(way.device).score(*sides, *masks)
        self.unit.to(CPU)
        assert scores_ME.dtype == torch.float32
        return scores_ME.cpu()

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
        return found_ME.float()

    def assert_equal(self, way: Way, wanted_ME: Tensor | None = None, atol: float | None = None) -> None:
        atol = ATOL[way.precision] if atol is None else atol
        found_ME, expected_ME = self.scores(way, wanted_ME), self.twin(wanted_ME)
        torch.testing.assert_close(found_ME, expected_ME, atol=atol, rtol=0, equal_nan=True)


def own_rows(column: Ragged) -> list[Tensor]:
    places = zip(column.starts.tolist(), column.lengths.tolist(), strict=True)
    return [column.values[start : start + length].double() for start, length in places]


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
    entities = {"global": normal(num_entities, GLOBAL_WIDTH), "local": normal(num_entities, width), "query": query}
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


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(
    lengths,
    lengths,
    st.sampled_from([1, 5, 16, 24, 96, 100]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_scores_of_wanted_pairs_are_the_twins(
    way: Way, mentions: list[int], entities: list[int], width: int, share: float, seed: int
) -> None:
    case = pairs(way, mentions, entities, width)
    wanted_ME = torch.rand(len(mentions), len(entities), generator=torch.Generator().manual_seed(seed)) < share
    case.assert_equal(way, None if share == 1.0 else wanted_ME)


def test_texts_of_all_lengths(way: Way) -> None:
    """Up to more tokens than Triton takes (PyTorch does), several groups of entities and tiles of rows."""
    pairs(way, [1, 16, 17, 40, 64, 77, 96], [1, 16, 17, 40, 77] + 12 * [2], 40).assert_equal(way)
    pairs(way, [97, 3], [5, 1], 40).assert_equal(way)


def test_one_token_each(way: Way) -> None:
    pairs(way, [1] * 3, [1] * 20).assert_equal(way)


def test_padding_that_is_not_hidden(way: Way) -> None:
    """All token places are real then, and the twin is the same."""
    case = pairs(way, [9] * 4, [13] * 5)
    case.unit.mask_padding = False
    case.assert_equal(way)
    case.assert_equal(way, torch.eye(4, 5, dtype=torch.bool))


def sharing(column: Ragged) -> Ragged:
    """The last item has the first one's rows, the one before it all of them but the last."""
    starts, lengths = column.starts.clone(), column.lengths.clone()
    starts[-2:], lengths[-2:] = starts[0], lengths[0] - torch.tensor([1, 0])
    return Ragged(column.values, starts, lengths)


def strided(column: Ragged) -> Ragged:
    """The same numbers, no two of them side by side in memory."""
    spread = (torch.stack([x, x + 1], dim=-1)[..., 0] for x in (column.values, column.starts, column.lengths))
    return Ragged(*spread)


@pytest.mark.parametrize("change", [sharing, strided])
def test_how_rows_lie_in_memory(way: Way, change: Callable[[Ragged], Ragged]) -> None:
    case = changed(pairs(way, [7, 3, 9, 5], [4, 20, 3, 6, 5]), change)
    case.assert_equal(way)
    case.assert_equal(way, torch.tensor([[True, False, True, True]] * 5).T)


@pytest.mark.parametrize("scale", [1e-4, 3.0, 100.0])
def test_attention_may_be_flat_or_all_on_one_token(way: Way, scale: float) -> None:
    """At 100 logits are some ten thousands: their last bits move the attention itself."""
    if way.precision == "fp16" and scale < 1:
        pytest.skip("half precision has no such small numbers")
    pairs(way, [40, 7], [77, 3, 12], 96, scale).assert_equal(way, atol=100 * ATOL["fp32"] + ATOL[way.precision])


@pytest.mark.parametrize("largest", [59.0, 61.0, 1000.0])
def test_large_logits(way: Way, largest: float) -> None:
    """The second mention has one token, with the largest logits and the least: from 60 on exp must not see them."""
    case = pairs(way, [77, 1], [40, 17, 5])
    key, query = case.mentions.ragged("key"), case.entities.ragged("query")
    key_Rd, query_Rd = key.values.double(), query.values.double()
    key_Rd = 8 * key_Rd / key_Rd.norm(dim=1, keepdim=True)
    query_Rd = query_Rd[:, :1].sign() * key_Rd[key.starts[1]] * (largest / 64)
    mentions = case.mentions.merged(Table({"key": replace(key, values=key_Rd.float())}))
    entities = case.entities.merged(Table({"query": replace(query, values=query_Rd.float())}))
    as_seen(way, Pairs(case.unit, mentions, entities)).assert_equal(way, atol=5 * ATOL[way.precision])


@pytest.mark.parametrize(
    ("name", "broken"), [*itertools.product(("key", "value", "query"), (torch.nan, torch.inf)), ("local", torch.nan)]
)
def test_what_is_not_finite_reaches_the_scores_of_its_item_only(way: Way, name: str, broken: float) -> None:
    case = pairs(way, [3, 5], [4, 6, 70])
    expected_ME = case.twin()
    side = case.entities if name in ("query", "local") else case.mentions
    if name == "local":
        side.dense(name)[1, 2] = broken
    else:
        side.ragged(name).values[side.ragged(name).starts[1], 0] = broken
    (expected_ME.T if side is case.entities else expected_ME)[1] = torch.nan
    torch.testing.assert_close(case.scores(way), expected_ME, atol=ATOL[way.precision], rtol=0, equal_nan=True)
    wanted_ME = torch.ones_like(expected_ME, dtype=torch.bool)
    (wanted_ME.T if side is case.entities else wanted_ME)[1] = False
    if name != "local":  # which is in every pair's score
        assert bool(case.scores(way, wanted_ME).isfinite().all())


def test_an_item_without_tokens_scores_nan(way: Way) -> None:
    assert pairs(way, [0, 2], [1, 3]).scores(way).isnan().tolist() == [[True, True], [False, False]]
    assert pairs(way, [2, 5], [1, 0]).scores(way).isnan().tolist() == [[False, True], [False, True]]


def test_no_mention_or_no_entity(way: Way) -> None:
    case, none = pairs(way, [3, 5], [4, 6]), slice(0, 0)
    assert replace(case, mentions=case.mentions.rows(none)).scores(way).shape == (0, 2)
    assert replace(case, entities=case.entities.rows(none)).scores(way).shape == (2, 0)


def test_pairs_below_a_floor_are_left_out_and_the_others_as_before(way: Way) -> None:
    case = pairs(way, [3, 5, 9, 2], [4, 6, 17, 8, 1, 2, 3])
    with torch.no_grad():
        case = replace(case, mentions=case.unit.with_bounds(case.mentions))
    expected_ME = case.twin()
    floor_M1 = expected_ME.max(dim=1, keepdim=True).values - 0.5
    found_ME = case.scores(way, None, floor_M1.expand_as(expected_ME))
    left_out_ME = found_ME == -math.inf
    assert bool((expected_ME < floor_M1)[left_out_ME].all())
    assert 0 < int(left_out_ME.sum()) < expected_ME.numel()
    torch.testing.assert_close(found_ME[~left_out_ME], expected_ME[~left_out_ME], atol=ATOL[way.precision], rtol=0)
