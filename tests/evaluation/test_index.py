"""The entity index on disk: built slice by slice, gone on with after an interruption, checked when it is opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.data.table import Ragged, Table, concatenate
from dsmip.errors import UserError
from dsmip.evaluation.index import EntityIndex, finish_index, index_slices

MADE_FROM: dict[str, Any] = {"model": "text", "data": "abc"}
NUM_ENTITIES = 10


def prepared(rows: range) -> Table:
    """Row n has the number n, and n % 3 + 1 token rows that say n."""
    numbers = torch.tensor(rows)
    lengths = numbers % 3 + 1
    tokens = torch.repeat_interleave(numbers, lengths)[:, None].float()
    return Table({"row": numbers.float()[:, None], "token": Ragged(tokens, lengths.cumsum(0) - lengths, lengths)})


def build(folder: Path, missing: int | None = None) -> EntityIndex:
    """All slices, whose order does not matter, or all but one."""
    slices = index_slices(folder, NUM_ENTITIES, slice_rows=4)
    for number, (path, rows) in reversed(list(enumerate(slices.items()))):
        if number != missing and not path.is_file():
            prepared(rows).save(path)
    return finish_index(folder, MADE_FROM, slices)


def assert_rows(table: Table, rows: list[int]) -> None:
    assert table.dense("row")[:, 0].tolist() == rows
    tokens_NTd, mask_NT = table.ragged("token").padded()
    for row, tokens_Td, mask_T in zip(rows, tokens_NTd, mask_NT, strict=True):
        assert tokens_Td[mask_T][:, 0].tolist() == [row] * (row % 3 + 1)


def test_a_built_index_holds_every_entity_in_order(tmp_path: Path) -> None:
    index = build(tmp_path / "index")
    assert len(index) == NUM_ENTITIES
    assert [len(table) for table in index.tables] == [4, 4, 2]
    for size in (1, 3, 100):
        tiles = list(index.tiles(size))
        assert all(len(tile) <= size for tile in tiles)
        assert_rows(concatenate(tiles), list(range(NUM_ENTITIES)))
    assert index.num_bytes == sum(table.num_bytes for table in index.tables) > 0


@given(rows=st.lists(st.integers(0, NUM_ENTITIES - 1), min_size=1), num_slices=st.integers(1, 12))
@settings(deadline=None)
def test_entities_by_place_and_by_slice(rows: list[int], num_slices: int) -> None:
    index = EntityIndex([prepared(range(4)), prepared(range(4, 5)), prepared(range(5, NUM_ENTITIES))], first_row=7)
    assert_rows(index.take(torch.tensor(sorted(rows))), sorted(rows))
    slices = [index.slice(number, num_slices) for number in range(num_slices)]
    assert sum(map(len, slices)) == NUM_ENTITIES
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    first = 0
    for part in slices:
        assert part.first_row == 7 + first
        if len(part):
            assert_rows(concatenate(part.tables), list(range(first, first + len(part))))
        first += len(part)


@pytest.mark.parametrize("missing", range(3))
def test_no_manifest_before_the_last_slice(tmp_path: Path, missing: int) -> None:
    with pytest.raises(UserError, match=rf"slice-00000{missing}\.safetensors is missing or damaged"):
        build(tmp_path, missing)
    with pytest.raises(UserError, match="no index"):
        EntityIndex.open(tmp_path, MADE_FROM)
    assert len(build(tmp_path)) == NUM_ENTITIES


def test_slices_are_checked_before_the_manifest(tmp_path: Path) -> None:
    path = next(iter(index_slices(tmp_path, NUM_ENTITIES, slice_rows=4)))
    for damage, message in ((b"", "is missing or damaged"), (None, "has 2 entities instead of 4; delete")):
        if damage is None:
            prepared(range(2)).save(path)
        else:
            path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"slice-000000\.safetensors {message}"):
            build(tmp_path)
        assert not (tmp_path / "index.json").exists()


def cut_off(folder: Path) -> None:
    path = folder / "slice-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def garble(folder: Path) -> None:
    path = folder / "slice-000001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def scramble(folder: Path) -> None:
    (folder / "index.json").write_text('{"made_from": 7, "slices": []}')


def lose(folder: Path) -> None:
    (folder / "slice-000002.safetensors").unlink()


def exchange(folder: Path) -> None:
    """As if a slice were left of a build with other slices."""
    prepared(range(2)).save(folder / "slice-000001.safetensors")
    manifest = json.loads((folder / "index.json").read_text())
    manifest["slices"][1]["bytes"] = (folder / "slice-000001.safetensors").stat().st_size
    (folder / "index.json").write_text(json.dumps(manifest))


def scribble(folder: Path) -> None:
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"slice-000001\.safetensors has \d+ bytes instead of \d+; delete"),
        (garble, r"slice-000001\.safetensors is missing or damaged .*; delete"),
        (scramble, r"index\.json is damaged .* delete the folder"),
        (lose, r"slice-000002\.safetensors is missing; delete"),
        (exchange, r"slice-000001\.safetensors has 2 entities instead of 4; delete"),
        (scribble, r"index\.json is damaged .* delete the folder"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    build(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        EntityIndex.open(tmp_path, MADE_FROM)
    with pytest.raises(UserError, match=message):
        finish_index(tmp_path, MADE_FROM, index_slices(tmp_path, NUM_ENTITIES, slice_rows=4))


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["made_from"] == MADE_FROM
    with pytest.raises(UserError, match="made from data abc, not xyz"):
        EntityIndex.open(tmp_path, MADE_FROM | {"data": "xyz"})


def test_shared_token_rows_are_stored_once(tmp_path: Path) -> None:
    def alike(rows: range) -> Table:
        starts: Tensor = torch.zeros(len(rows), dtype=torch.int64)
        return Table({"token": Ragged(torch.ones(5, 8), starts, starts + 5)})

    slices = index_slices(tmp_path, 100, slice_rows=50)
    for path, rows in slices.items():
        alike(rows).save(path)
    index = finish_index(tmp_path, MADE_FROM, slices)
    values = [table.ragged("token").values for table in index.tables]
    assert [len(rows) for rows in values] == [5, 5]
