"""Tables written batch by batch are those that are written at once."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.data.table import Ragged, Repeated, Table, concatenate
from dsmip.data.table_writer import TableWriter


def batch(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Table:
    """Texts of 1 to 4 tokens, pictures of 3; and token rows in between that no item uses."""
    lengths_N = torch.randint(1, 5, (count,), generator=generator)
    starts_N = (lengths_N + 1).cumsum(0) - lengths_N
    values_Rd = torch.randn(int(lengths_N.sum()) + count + 1, 6, generator=generator).to(dtype)
    return Table(
        {
            "global": torch.randn(count, 2, 3, generator=generator).to(dtype),
            "number": torch.arange(count),
            "text": Ragged(values_Rd, starts_N, lengths_N),
            "image": Ragged.from_padded(torch.randn(count, 3, 2, generator=generator).to(dtype)),
        }
    )


def assert_same(found: Table, expected: Table) -> None:
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        other = found.columns[name]
        assert not isinstance(column, Repeated)
        if isinstance(column, Ragged):
            assert isinstance(other, Ragged)
            assert torch.equal(other.lengths, column.lengths)
            column, other = column.padded()[0], other.padded()[0]
        assert isinstance(other, Tensor)
        assert other.dtype == column.dtype
        assert torch.equal(other, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_pieces_are_joined(sizes: list[int], seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [batch(size, generator, dtype) for size in sizes]
    with TableWriter(tmp_path / "table.safetensors") as writer:
        for each in batches:
            writer.append(each)
    expected = concatenate(batches)
    if len(expected):
        assert_same(Table.load(tmp_path / "table.safetensors"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]


def test_token_rows_of_items_that_are_alike_are_stored_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    same_PD = torch.ones(3, 2)
    batches, masks = [batch(5, generator) for _ in range(3)], torch.rand(3, 5, generator=generator) < 0.5
    with TableWriter(tmp_path / "table.safetensors") as writer:
        for each, alike_N in zip(batches, masks, strict=True):
            image = each.ragged("image")
            image.values.view(5, 3, 2)[alike_N] = same_PD
            writer.append(each, {"image": alike_N})
    found = Table.load(tmp_path / "table.safetensors")
    assert_same(found, concatenate(batches))
    assert len(found.ragged("image").values) == 3 * (int((~masks).sum()) + 1)
    assert len(found.ragged("text").values) == int(found.ragged("text").lengths.sum())


def test_nothing_is_left_of_a_table_that_failed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TableWriter(tmp_path / "sub" / "table.safetensors") as writer:
            writer.append(batch(2, torch.Generator()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "sub").iterdir()) == []
