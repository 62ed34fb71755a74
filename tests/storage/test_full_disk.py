"""A disk that is full, whatever library writes: the error names the folder, and nothing half-written stays."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)
from dsmip.data.table import Ragged, Table
from dsmip.data.table_writer import TableWriter
from dsmip.errors import no_room, no_room_message
from dsmip.runs.weights import save_weights
from dsmip.storage.atomic import atomic_path, write_json
from tests.support.full_disk import small_disk, small_files

MANY = 1 << 20


def _parquet(folder: Path) -> None:
    with atomic_path(folder / "ranks.parquet") as path:
        pq.write_table(pa.table({"rank": torch.rand(MANY).numpy()}), path)


def _arrow(folder: Path) -> None:
    table = pa.table({"rank": torch.rand(MANY).numpy()})
    with atomic_path(folder / "rows.arrow") as path, pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _safetensors(folder: Path) -> None:
    save_weights(folder / "weights.safetensors", {"a": torch.zeros(MANY)})


def _table(folder: Path) -> None:
    Table({"x": torch.zeros(MANY, 1)}).save(folder / "index.safetensors")


def _table_in_pieces(folder: Path) -> None:
    with TableWriter(folder / "features.safetensors") as writer:
        for _ in range(8):
            numbers = torch.zeros(MANY // 8, 1)
            writer.append(Table({"x": numbers, "tokens": Ragged.from_padded(numbers[:, :, None])}))


def _json(folder: Path) -> None:
    write_json(folder / "metrics.json", {"figures": list(range(MANY // 4))})


def _torch(folder: Path) -> None:
    with atomic_path(folder / "optimizer.pt") as path, path.open("wb") as stream:
        torch.save({"a": torch.zeros(MANY)}, stream)


WRITERS = [_parquet, _arrow, _safetensors, _table, _table_in_pieces, _json, _torch]


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_without_room(write: Callable[[Path], None], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write(disk / "new")
        said = no_room_message(caught.value, "elsewhere")
        assert said == f"no space left on the disk of {disk / 'new'}; make room there"
        assert list((disk / "new").iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_may_not_grow(write: Callable[[Path], None], tmp_path: Path) -> None:
    with small_files(1 << 16), pytest.raises(OSError) as caught:  # noqa: PT011
        write(tmp_path / "new")
    assert no_room(caught.value)
    assert str(tmp_path / "new") in no_room_message(caught.value, "elsewhere")
    assert "ulimit -f" in no_room_message(caught.value, "elsewhere")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_cannot_be_made_goes_by_its_own_name(tmp_path: Path) -> None:
    """Not by that of the unfinished one beside it, which here is longer than a name may be."""
    with pytest.raises(OSError, match=r"/r+'$"):
        write_json(tmp_path / ("r" * 240), {})
