"""A disk that is full while a checkpoint is written: no half checkpoint, and an error that says so."""

from pathlib import Path

import pytest
import torch

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)
from dsmip.errors import no_room
from dsmip.runs.checkpoints import MANIFEST, Checkpoint, save_checkpoint
from dsmip.storage.locations import open_run_storage
from ray_jobs.cluster.failures import Failure, failure_of
from tests.support.full_disk import fill, small_disk

LARGE, SMALL = {"unit": torch.zeros(1 << 20)}, {"unit": torch.zeros(1)}


@pytest.mark.parametrize(("weights", "optimizer"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_whatever_file_does_not_fit(
    tmp_path: Path, weights: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            save_checkpoint(disk / "new", Checkpoint(1, [], weights, weights, optimizer, {}, {}))
        assert no_room(caught.value)
        assert not (disk / "new" / MANIFEST).exists()
        # a worker writes into its scratch folder, whose disk need not be that of the run
        message = f"no space left on the disk of {disk / 'new'}; make room there"
        failure = failure_of(caught.value, open_run_storage(tmp_path / "run"))
        assert failure == Failure(message, user_error=True, may_pass=True)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "file", Checkpoint(1, [], SMALL, SMALL, SMALL, {}, {}))


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        fill(disk / "filler")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            (disk / "more").write_bytes(bytes(10))
        assert no_room(caught.value)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        (tmp_path / "missing" / "file").write_bytes(b"")
    assert not no_room(caught.value)
