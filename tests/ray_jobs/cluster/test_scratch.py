"""Folders of killed workers are removed by the next worker of the machine, those of living ones stay."""

import subprocess
import sys
from pathlib import Path

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
