"""Free memory as the machine and a container's limit say it."""

from pathlib import Path

import pytest

from dsmip.linking.memory import free_memory

MEMINFO = "MemTotal:       24683648 kB\nMemAvailable:    1048576 kB\n"


def machine(
    folder: Path, meminfo: str | None, limit: str | None = None, used: int = 0, files: int = 0
) -> tuple[Path, Path]:
    if meminfo is not None:
        (folder / "meminfo").write_text(meminfo)
    if limit is not None:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    if files:
        stated = f"anon 77\nactive_file {files - 1}\ninactive_file 1\n"
        (folder / "memory.stat").write_text(stated)
    return folder / "meminfo", folder


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "free"),
    [
        (MEMINFO, None, 0, 2**30),
        (MEMINFO, "max", 0, 2**30),
        (MEMINFO, str(2**29), 2**28, 2**28),
        (MEMINFO, str(2**40), 0, 2**30),
        (MEMINFO, "1000", 2000, 0),
        ("MemTotal: 1 kB\n", None, 0, None),
        (None, str(2**20), 0, 2**20),
        (None, None, 0, None),
    ],
)
def test_the_smaller_of_both(
    tmp_path: Path, meminfo: str | None, limit: str | None, used: int, free: int | None
) -> None:
    assert free_memory(*machine(tmp_path, meminfo, limit, used)) == free


def test_files_that_were_read_are_given_up(tmp_path: Path) -> None:
    assert free_memory(*machine(tmp_path, MEMINFO, str(2**29), 2**29, files=2**27)) == 2**27
