"""Folders of killed workers are removed by the next worker of the machine, those of living ones stay."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsmip.errors import UserError
from ray_jobs.cluster.scratch import Scratch
from tests.support.paths import ROOT

WORKER = """
import sys
from pathlib import Path
from ray_jobs.cluster.scratch import Scratch
folder = Scratch(Path(sys.argv[1])).folder("epoch-")
(folder / "weights").write_bytes(bytes(1000))
print(folder, flush=True)
sys.stdin.read()
"""


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    mine = Scratch(root).folder("restored-")
    other = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        second = Scratch(root)
        assert (theirs / "weights").is_file()
    finally:
        other.kill()
        other.communicate()
    assert (theirs / "weights").is_file()
    third = Scratch(root).folder("epoch-")
    assert not theirs.parent.exists()
    assert mine.is_dir()
    assert second.folder("epoch-").is_dir()
    assert third.is_dir()
    assert {path.suffix for path in root.iterdir()} <= {"", ".lock"}
    assert len(list(root.glob("*.lock"))) == len(list(root.glob("worker-*/")))


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "worker-of-theirs").mkdir(parents=True)
    link = tmp_path / "scratch"
    link.symlink_to(victim)
    with pytest.raises(UserError, match=f"^{link}: is a link.*set TMPDIR to another folder"):
        Scratch(link)
    assert [path.name for path in victim.iterdir()] == ["worker-of-theirs"]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(UserError, match=f"^{root}: other users may write there"):
        Scratch(root)
    assert list(root.iterdir()) == []
