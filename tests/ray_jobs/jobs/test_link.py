"""Bulk linking on a real Ray: workers make the file that one process makes, also when one is lost, or the driver."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dsmip.errors import UserError
from dsmip.linking import bulk
from dsmip.linking.bulk import BulkOptions
from dsmip.linking.linker import Linker
from dsmip.linking.load import LoadOptions
from dsmip.progress import Progress
from dsmip.runs.run import Run
from ray_jobs.cli import app
from ray_jobs.jobs.link import link_on_ray
from ray_jobs.local_jobs.linking.many import link_mentions
from ray_jobs.local_jobs.linking.one import LinkModel
from ray_jobs.terminal.display import Display
from tests.support.cluster.ray_heads import processes_of
from tests.support.displays import Lines
from tests.support.paths import ROOT
from tests.support.small_release import image_bytes


@pytest.fixture
def mentions(tmp_path: Path) -> Path:
    """A folder with two files of mentions, three of which cannot be read."""
    folder = tmp_path / "mentions"
    folder.mkdir()
    (folder / "red.jpg").write_bytes(image_bytes((30, 20)))
    records: list[Any] = [{"mention_id": str(n), "word": f"word {n}", "image": None} for n in range(8)]
    records[2] |= {"image": "red.jpg"}
    records[3] |= {"image": "lost.jpg"}
    records[5]["word"] = ""
    lines = [*map(json.dumps, records), "{"]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 3)


def model_of(run: Run) -> LinkModel:
    return LinkModel(str(run.folder), "cpu", LoadOptions())


@dataclass(frozen=True)
class KillsOnce(LinkModel):
    """The first process that opens it is killed then, unless it is the driver."""

    driver: int = 0

    def opened(self, progress: Progress, notice: Any) -> Linker:
        linker = super().opened(progress, notice)
        if os.getpid() != self.driver:
            with contextlib.suppress(FileExistsError):
                (Path(str(self.location)) / "killed-linker").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return linker


def assert_workers_make_the_same(model: LinkModel, run: Run, mentions: Path, folder: Path) -> None:
    link_mentions(model_of(run), mentions, folder / "one.parquet", BulkOptions(), Display())
    assert pq.read_table(folder / "one.parquet").column("reason").null_count == 12
    link_on_ray(model, mentions, folder / "two.parquet", BulkOptions(), Display(), workers=2)
    assert (folder / "two.parquet").read_bytes() == (folder / "one.parquet").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "small_blocks")
def test_workers_make_the_file_that_one_process_makes(run: Run, mentions: Path, tmp_path: Path) -> None:
    """Though one of them is lost: its blocks go to another one."""
    model = KillsOnce(str(run.folder), "cpu", LoadOptions(), os.getpid())
    assert_workers_make_the_same(model, run, mentions, tmp_path)
    assert (run.folder / "killed-linker").exists()
    lines = Lines()
    link_on_ray(model_of(run), mentions, tmp_path / "two.parquet", BulkOptions(), lines, workers=2)
    assert lines.lines == [f"{tmp_path / 'two.parquet'}: is complete already"]


@dataclass(frozen=True)
class Changes(LinkModel):
    """Its file of mentions is another one when a worker opens it."""

    driver: int = 0
    mentions: str = ""

    def opened(self, progress: Progress, notice: Any) -> Linker:
        if os.getpid() != self.driver:
            Path(self.mentions).write_text('{"word": "another"}')
        return super().opened(progress, notice)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "small_blocks")
def test_a_users_mistake_comes_from_a_worker_as_it_is(run: Run, mentions: Path, tmp_path: Path) -> None:
    model = Changes(str(run.folder), "cpu", LoadOptions(), os.getpid(), str(mentions / "lines.jsonl"))
    out = tmp_path / "links.parquet"
    with pytest.raises(UserError, match=r"lines\.jsonl: was changed while its mentions were linked"):
        link_on_ray(model, mentions, out, BulkOptions(), Display(), workers=1)
    assert not out.exists()


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_command_goes_on_and_ends_the_same(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed with its whole cluster when the first of eight blocks is there."""
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 40)
    code = (
        "from dsmip.linking import bulk; from ray_jobs.cli import run_script; bulk.BLOCK_ROWS = 40; run_script('link')"
    )
    records = [json.dumps({"word": f"word {number}"}) for number in range(8 * 40)]
    (tmp_path / "mentions.jsonl").write_text("\n".join(records))
    temporary = Path(tempfile.mkdtemp(prefix="dl"))
    variables = {**os.environ, "RAY_TMPDIR": str(temporary)}
    variables.pop("RAY_ADDRESS", None)
    source, out = str(tmp_path / "mentions.jsonl"), tmp_path / "links.parquet"
    arguments = [str(run.folder), source, "--out", str(out), "--top", "2", "--workers", "2"]
    job = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not list(tmp_path.glob(".links.parquet.parts/block-*")):
            assert job.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for process in processes_of(temporary):  # Ray's workers, which have a session of their own
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
    assert not out.exists()
    resumed = CliRunner().invoke(app, ["link", *arguments], catch_exceptions=False)
    assert re.search(r"[1-7] of 8 blocks of mentions are there already", resumed.output), resumed.output
    options = BulkOptions(top=2)
    link_mentions(model_of(run), source, tmp_path / "one.parquet", options, Display())
    assert out.read_bytes() == (tmp_path / "one.parquet").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{mentions} --out {out} --workers 2 --device cuda:1", "Ray gives each worker its device; say cuda"),
        ("{mentions} --out {out} --workers 2 --device tpu", "device tpu"),
        ("--word red --workers 2", "--workers goes with a file of mentions"),
        ("{mentions}/gone.jsonl --out {out} --workers 2", "no such file of mentions"),
        ("{mentions} --out {out}.csv --workers 2", r"ends in \.parquet"),
    ],
)
def test_mistakes_are_told_before_ray_starts(run: Run, mentions: Path, tmp_path: Path, options: str, said: str) -> None:
    given = options.format(mentions=mentions, out=tmp_path / "out.parquet").split()
    ended = CliRunner().invoke(app, ["link", str(run.folder), *given])
    assert isinstance(ended.exception, UserError), ended.output
    assert re.search(said, str(ended.exception))
