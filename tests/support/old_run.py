"""The data directory and the run that an earlier commit wrote (`tools/archive_run.py` made the archive)."""

import tarfile
from pathlib import Path

from tests.support.paths import STORED
from tools.archive_run import ROOT as WRITTEN_AT
from tools.archive_run import write_backbone

ARCHIVE = STORED / "run_of_2026_11.tar.xz"


def unpack(folder: Path) -> Path:
    """`data` and `run` below a folder, moved there as users move theirs: by changing the paths in the run's files."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    write_backbone(folder)
    for path in [folder / "run/run.json", *folder.glob("run/**/config.yaml")]:
        path.write_text(path.read_text(encoding="utf-8").replace(WRITTEN_AT, str(folder)), encoding="utf-8")
    return folder
