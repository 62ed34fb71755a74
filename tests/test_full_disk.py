"""A disk that is full while a checkpoint is written: no half checkpoint, and an error that says so."""

from pathlib import Path

import pytest
import torch
from full_disk import fill, small_disk

import ray_jobs.environment  # noqa: F401  (before Ray is imported)
from dsmip.checkpoints import MANIFEST, Checkpoint, save_checkpoint
from ray_jobs.causes import failure_of
from ray_jobs.failures import Failure, no_room

LARGE, SMALL = {"unit": torch.zeros(1 << 20)}, {"unit": torch.zeros(1)}


@pytest.mark.parametrize(("weights", "optimizer"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_whatever_file_does_not_fit(
    tmp_path: Path, weights: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own)
            save_checkpoint(disk / "new", Checkpoint(1, [], weights, weights, optimizer, {}, {}))
        assert no_room(caught.value)
        assert not (disk / "new" / MANIFEST).exists()
        message = f"no space left on the disk of {disk}; make room there"
        assert failure_of(caught.value, disk) == Failure(message, user_error=True, may_pass=True)


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        fill(disk / "filler")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            (disk / "more").write_bytes(bytes(10))
        assert no_room(caught.value)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        (tmp_path / "missing" / "file").write_bytes(b"")
    assert not no_room(caught.value)
