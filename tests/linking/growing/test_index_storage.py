"""Stored numbers of an index: how far they are from what they were, and that nothing drifts when stored again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmip.data.table import Ragged, Repeated, Table, concatenate
from dsmip.evaluation.index import EntityIndex
from dsmip.linking.bundle import IndexDtype
from dsmip.linking.growing.index_storage import restored, stored_as

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])


def made(seed: int, num_items: int, scale: float) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    lengths = torch.randint(1, 4, (num_items,), generator=generator)
    lengths[-1] = lengths[0]
    starts = lengths.cumsum(0) - lengths
    starts[-1] = starts[0]  # the last item shares the first one's rows
    return Table(
        {
            "vector": normal(num_items, 5),
            "tokens": Ragged(normal(int(lengths.sum()), 3), starts, lengths),
            "picture": Repeated(normal(2, 4), torch.arange(num_items, dtype=torch.int32) % 2),
            "number": normal(num_items),
            "row": torch.arange(num_items),
        }
    )


def padded(table: Table) -> dict[str, torch.Tensor]:
    return {
        name: column.padded()[0] if isinstance(column, Ragged) else table.dense(name)
        for name, column in table.columns.items()
    }


@every_dtype
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_items=st.integers(1, 6), scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]))
def test_numbers_are_read_within_half_a_step(dtype: IndexDtype, seed: int, num_items: int, scale: float) -> None:
    table = made(seed, num_items, scale)
    found, expected = padded(restored(stored_as(table, dtype))), padded(table)
    assert found.keys() == expected.keys()
    assert torch.equal(found["row"], expected["row"])
    for name in ("vector", "tokens", "picture"):
        largest = expected[name].abs().amax(dim=-1, keepdim=True)
        step = {"float32": 0.0, "float16": 2**-11, "int8": 1 / 254}[dtype]
        assert bool(((found[name] - expected[name]).abs() <= step * 1.001 * largest + 1e-7).all())


@every_dtype
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_items=st.integers(1, 6))
def test_what_was_read_is_stored_as_it_was(dtype: IndexDtype, seed: int, num_items: int) -> None:
    stored = stored_as(made(seed, num_items, 1.0), dtype)
    again = stored_as(restored(stored), dtype)
    assert again.columns.keys() == stored.columns.keys()
    for name, tensor in padded(stored).items():
        assert torch.equal(padded(again)[name], tensor), name


@every_dtype
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 7), wanted=st.sets(st.integers(0, 10), min_size=1))
def test_an_index_restores_what_is_read_of_it(dtype: IndexDtype, seed: int, size: int, wanted: set[int]) -> None:
    stored = [stored_as(made(seed + number, num_items, 1.0), dtype) for number, num_items in enumerate((6, 5))]
    index, whole = EntityIndex(stored, restored=restored), concatenate([restored(table) for table in stored])
    assert index.num_bytes == sum(table.num_bytes for table in stored)
    for each in (index, index.to(torch.device("cpu"))):
        assert_equal(concatenate(list(each.tiles(size))), whole)
    rows = torch.tensor(sorted(wanted))
    assert_equal(index.take(rows), whole.take(rows))
    part = index.slice(1, 2)
    assert_equal(concatenate(list(part.tiles(size))), whole.rows(slice(part.first_row, None)))
    of_part = EntityIndex([table.prefixed("text") for table in stored], restored=restored).under("text")
    assert_equal(concatenate(list(of_part.tiles(size))), whole)


def assert_equal(found: Table, expected: Table) -> None:
    assert {name: type(each) for name, each in found.columns.items()} == {
        name: type(each) for name, each in expected.columns.items()
    }
    values, others = padded(found), padded(expected)
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)


def test_rows_stay_shared_and_take_a_quarter() -> None:
    table = made(3, 6, 1.0)
    stored = stored_as(table, "int8")
    tokens = stored.ragged("tokens")
    assert (tokens.starts[-1], tokens.values.dtype) == (tokens.starts[0], torch.int8)
    wide = Table({"vector": torch.randn(50, 96)})
    assert stored_as(wide, "int8").num_bytes == wide.num_bytes / 4 + 50 * 4
