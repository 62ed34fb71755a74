"""Tables of dense and ragged columns against lists of lists."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.data.table import Ragged, Repeated, Table, concatenate

Rows = list[list[float]]
WIDTH = 2
MAPS = Path("/proc/self/maps")  # files mapped into this process, where the system tells


def ragged(lengths: list[int], first: float = 0.0) -> Ragged:
    """Items of these lengths whose rows hold consecutive numbers."""
    count = torch.tensor(lengths, dtype=torch.int64)
    values = first + torch.arange(sum(lengths) * WIDTH, dtype=torch.float32).reshape(-1, WIDTH)
    return Ragged(values, count.cumsum(0) - count, count)


def rows_of(column: Ragged) -> list[Rows]:
    """Each item's token rows."""
    spans = zip(column.starts.tolist(), column.lengths.tolist(), strict=True)
    return [column.values[start : start + length].tolist() for start, length in spans]


def table(lengths: list[int], first: float = 0.0) -> Table:
    return Table({"id": first + torch.arange(len(lengths)), "tokens": ragged(lengths, first)})


LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=7)


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_rows_take_and_compact_keep_what_items_hold(lengths: list[int], data: st.DataObject) -> None:
    whole = table(lengths)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    rows = torch.tensor(index, dtype=torch.int64)
    expected = [rows_of(whole.ragged("tokens"))[row] for row in index]
    chosen, taken = whole.rows(rows), whole.take(rows)
    for result in (chosen, taken):
        assert len(result) == len(index)
        assert result.dense("id").tolist() == [float(row) for row in index]
        assert rows_of(result.ragged("tokens")) == expected
    assert chosen.ragged("tokens").values is whole.ragged("tokens").values
    assert len(taken.ragged("tokens").values) == sum(lengths[row] for row in set(index))


@given(lengths=LENGTHS, start=st.integers(0, 7), stop=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_slices_are_rows(lengths: list[int], start: int, stop: int) -> None:
    part = table(lengths).take(slice(start, stop))
    assert rows_of(part.ragged("tokens")) == rows_of(ragged(lengths))[start:stop]
    assert len(part.ragged("tokens").values) == sum(lengths[start:stop])


@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_padded_and_packed_again(lengths: list[int]) -> None:
    column = ragged(lengths, first=1.0)
    values_NTd, mask_NT = column.padded()
    assert values_NTd.shape == (len(lengths), max(lengths), WIDTH)
    assert mask_NT.sum(dim=1).tolist() == lengths
    assert float(values_NTd[~mask_NT].abs().sum()) == 0.0
    again = Ragged.from_padded(values_NTd, mask_NT)
    assert rows_of(again) == rows_of(column)
    full = Ragged.from_padded(values_NTd)
    assert rows_of(full) == values_NTd.tolist()


def test_an_empty_batch_is_packed_and_padded() -> None:
    """A worker's empty share."""
    for mask in (None, torch.ones(0, 3, dtype=torch.bool)):
        column = Ragged.from_padded(torch.zeros(0, 3, WIDTH), mask)
        assert column.values.shape == (0, WIDTH)
        assert column.compact().values.shape == (0, WIDTH)
    assert len(table([]).take(slice(None))) == 0
    both = concatenate([table([]), table([2, 1])])
    assert rows_of(both.ragged("tokens")) == rows_of(ragged([2, 1]))


def test_shared_token_rows_are_stored_once() -> None:
    """As items without a picture share theirs."""
    column = Ragged(torch.arange(10.0).reshape(5, 2), torch.tensor([3, 0, 3, 0]), torch.tensor([2, 1, 2, 1]))
    compact = column.compact()
    assert rows_of(compact) == rows_of(column)
    assert compact.values.tolist() == [[0.0, 1.0], [6.0, 7.0], [8.0, 9.0]]
    assert Table({"tokens": compact}).num_bytes == 3 * 2 * 4 + 2 * 4 * 8


def test_gradients_reach_shared_rows() -> None:
    values = torch.ones(3, WIDTH, requires_grad=True)
    column = Ragged(values, torch.tensor([0, 0, 2]), torch.tensor([2, 2, 1]))
    padded_NTd, _ = column.compact().padded()
    padded_NTd.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


@given(parts=st.lists(LENGTHS, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_concatenate_appends_rows(parts: list[list[int]]) -> None:
    tables = [table(lengths, first=100.0 * number) for number, lengths in enumerate(parts)]
    both = concatenate(tables)
    assert rows_of(both.ragged("tokens")) == [rows for t in tables for rows in rows_of(t.ragged("tokens"))]
    assert both.dense("id").tolist() == [row for t in tables for row in t.dense("id").tolist()]
    # rows of a larger table bring all its token rows along, which must not shift the others'
    views = concatenate([t.rows(slice(1, None)) for t in tables])
    assert rows_of(views.ragged("tokens")) == [rows for t in tables for rows in rows_of(t.ragged("tokens"))[1:]]


def test_nothing_to_concatenate() -> None:
    with pytest.raises(ValueError, match="no tables"):
        concatenate([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_saved_table_is_read_back_mapped(tmp_path: Path, dtype: torch.dtype) -> None:
    """Only used token rows are written; an opened table's tensors stay in the file."""
    tokens = Ragged(ragged([2, 3, 1]).values.to(dtype), *(getattr(ragged([2, 3, 1]), n) for n in ("starts", "lengths")))
    whole = Table({"a.id": torch.arange(3).to(dtype), "a.tokens": tokens})
    path = tmp_path / "deep" / "table.safetensors"
    whole.rows(torch.tensor([2, 0])).save(path, metadata={"split": "test"})
    stored = Table.load(path)
    assert sorted(stored.columns) == ["a.id", "a.tokens"]
    assert torch.equal(stored.dense("a.id"), whole.dense("a.id")[[2, 0]])
    assert rows_of(stored.ragged("a.tokens")) == [rows_of(tokens)[2], rows_of(tokens)[0]]
    assert stored.ragged("a.tokens").values.dtype == dtype
    assert len(stored.ragged("a.tokens").values) == 3
    if MAPS.exists():
        assert str(path) in MAPS.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    table([1, 2]).save(path)
    broken = Table({"id": torch.arange(2), "bad": torch.zeros(2, 2).to_sparse()})
    with pytest.raises(Exception, match=r".+"):
        broken.save(path)
    assert rows_of(Table.load(path).ragged("tokens")) == rows_of(ragged([1, 2]))
    assert list(tmp_path.iterdir()) == [path]


def test_columns_must_agree_in_their_rows() -> None:
    with pytest.raises(ValueError, match="'tokens': 2"):
        Table({"id": torch.zeros(3), "tokens": ragged([1, 1])})


def test_kinds_of_columns_are_checked() -> None:
    whole = table([1])
    with pytest.raises(TypeError, match="tokens is ragged"):
        whole.dense("tokens")
    with pytest.raises(TypeError, match="id is dense"):
        whole.ragged("id")


def test_prefixes() -> None:
    text, gate = Table({"x": torch.zeros(2)}), Table({"x": torch.ones(2)})
    both = text.prefixed("text").merged(gate.prefixed("gate"))
    assert sorted(both.columns) == ["gate.x", "text.x"]
    assert torch.equal(both.under("gate").dense("x"), torch.ones(2))
    assert both.under("tex").columns == {}
    assert len(Table({})) == 0


def test_to_moves_every_tensor() -> None:
    def devices(columns: Table) -> set[str]:
        tokens = columns.ragged("tokens")
        tensors: list[Tensor] = [columns.dense("id"), tokens.values, tokens.starts, tokens.lengths]
        return {tensor.device.type for tensor in tensors}

    assert devices(table([1, 2]).to(torch.device("meta"))) == {"meta"}


def test_a_transform_sees_only_token_rows_in_use() -> None:
    table = Ragged(torch.arange(10.0)[:, None], torch.tensor([0, 4, 7]), torch.tensor([4, 3, 3]))
    part = table.rows(slice(1, 2))
    seen: list[int] = []

    def doubled(values: Tensor) -> Tensor:
        seen.append(len(values))
        return 2 * values

    assert part.map_rows(doubled).padded()[0].flatten().tolist() == [8.0, 10.0, 12.0]
    assert table.map_rows(doubled).values is not table.values
    assert seen == [3, 10]


INDEX = st.lists(st.integers(0, 3), min_size=1, max_size=7)


@given(index=INDEX, data=st.data())
@settings(max_examples=40, deadline=None)
def test_repeated_rows_are_stored_once(index: list[int], data: st.DataObject) -> None:
    values = torch.arange(8.0).reshape(4, 2)
    whole = Table({"x": Repeated(values, torch.tensor(index, dtype=torch.int32)), "tokens": ragged([1] * len(index))})
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(index) - 1), max_size=9)), dtype=torch.int64)
    expected = values[torch.tensor(index)][rows]
    for chosen in (whole.rows(rows), whole.take(rows)):
        assert len(chosen) == len(rows)
        assert torch.equal(chosen.dense("x"), expected)
    column = whole.take(rows).columns["x"]
    assert isinstance(column, Repeated)
    assert len(column.values) == len(expected.unique(dim=0)) if len(rows) else len(column.values) == 0
    assert whole.cast(torch.float64).dense("x").dtype == torch.float64
    both = concatenate([whole.rows(rows), Table({"x": values, "tokens": ragged([2] * 4)}), whole])
    assert torch.equal(both.dense("x"), torch.cat([expected, values, whole.dense("x")]))
    with pytest.raises(TypeError, match="x is dense"):
        whole.ragged("x")


@given(index=INDEX, other=INDEX)
@settings(max_examples=40, deadline=None)
def test_distinct_rows_and_their_places(index: list[int], other: list[int]) -> None:
    """Rows are equal where all columns say so."""
    num_rows = min(len(index), len(other))
    pairs = list(zip(index, other, strict=False))
    columns = [torch.tensor(each[:num_rows], dtype=torch.int32) for each in (index, other)]
    numbered = Table({name: Repeated(torch.arange(4), each) for name, each in zip("ab", columns, strict=True)})
    once, index_N = numbered.distinct()
    if index_N is None:
        assert len(set(pairs)) == num_rows
        assert once is numbered
        return
    assert len(once) == len(set(pairs)) < num_rows
    for name in "ab":
        assert torch.equal(once.dense(name)[index_N], numbered.dense(name))
    plain = numbered.merged(Table({"c": torch.zeros(num_rows)}))
    assert plain.distinct() == (plain, None)


def test_repeated_rows_are_saved_once_and_read_back(tmp_path: Path) -> None:
    column = Repeated(torch.arange(8.0).reshape(4, 2), torch.tensor([2, 0, 2], dtype=torch.int32))
    Table({"x": column, "tokens": ragged([1, 2, 1])}).save(tmp_path / "table.safetensors")
    stored = Table.load(tmp_path / "table.safetensors").columns["x"]
    assert isinstance(stored, Repeated)
    assert stored.values.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert stored.index.tolist() == [1, 0, 1]
    assert stored.index.dtype == torch.int32
