"""Preparation that is killed, runs out of room, or works on Ray: what is finished stays, the result is the same."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.runners import Tick
from data_prep.formats.mimic import MimicRelease
from dsmip.runs.provenance import RECORDS
from tests.support.paths import ROOT
from tests.support.small_release import plain_release

WAIT_SECONDS = 60.0


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(RECORDS)}  # these have times


def _start(release: Path, out: Path, *options: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_jobs.prepare", str(release), str(out), "--name", "plain", *options]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=limit,
    )  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_release(tmp_path_factory.mktemp("plain") / "release", 300, 4000)


@pytest.fixture(scope="module")
def undisturbed(release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare(MimicRelease(release), out, DatasetOptions(name="plain"))
    return _contents(out)


@pytest.mark.slow
def test_a_killed_build_and_one_without_room_go_on_from_their_finished_shards(
    release: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed, then started where files may not grow large enough, then with room."""
    out = tmp_path / "data"
    build = _start(release, out)
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(out.glob(".unfinished/train-*.done")):
        assert build.poll() is None, build.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    assert not (out / "manifest.json").exists()
    finished = {path.stem: path for path in out.glob(".unfinished/*.done")}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar") if path.stem in finished}
    assert 1 < len(before) < 18
    half_written = set(out.rglob("*.tmp"))

    full = _start(release, out, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    _, said = full.communicate(timeout=WAIT_SECONDS)
    assert full.returncode == 2
    assert "cannot be written: File too large" in said
    assert "run the command again: it goes on" in said
    assert "Traceback" not in said
    assert set(out.rglob("*.tmp")) <= half_written

    again = _start(release, out)
    _, said = again.communicate(timeout=WAIT_SECONDS)
    assert again.returncode == 0, said
    assert _contents(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_makes_the_same(tmp_path: Path) -> None:
    from ray_jobs.jobs.prepare import run_on_ray

    release, named = MimicRelease(plain_release(tmp_path / "release", 20, 700)), DatasetOptions(name="plain")
    prepare(release, tmp_path / "alone", named)
    seen: list[tuple[str, int, int]] = []
    progress = lambda *step: seen.append(step)  # noqa: E731
    with run_on_ray(2, print) as run:
        prepare(release, tmp_path / "data", named, run=run, progress=progress)
    assert _contents(tmp_path / "data") == _contents(tmp_path / "alone")
    assert len(list((tmp_path / "data").rglob("*.tar"))) > 3
    assert seen[-1] == ("mentions", 704, 704)


@pytest.mark.usefixtures("ray_cluster")
def test_a_build_that_cannot_begin_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All CPUs are taken until it has said so."""
    import ray

    from ray_jobs.cluster import resources
    from ray_jobs.jobs.prepare import run_on_ray

    taken, said = tmp_path / "taken", tmp_path / "said"

    def take() -> None:
        taken.touch()
        deadline = time.monotonic() + WAIT_SECONDS
        while not said.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    class Seven:
        def run(self, tick: Tick) -> int:
            tick(1)
            return 7

    monkeypatch.setattr(resources, "WAIT_LINE_SECONDS", 0.0)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "waiting" in line:  # Ray's head hears of it within seconds
            said.touch()

    taking = ray.remote(num_cpus=4)(take).remote()
    while not taken.exists():
        assert not ray.wait([taking], timeout=0.02)[0]
    with run_on_ray(2, say) as run:
        assert list(run([], lambda count: None)) == []
        assert list(run([Seven(), Seven(), Seven()], lambda count: None)) == [7, 7, 7]
    assert said.exists()
    waits = "  waiting to start: prepare asks 1..2 workers with 1 CPU each; free: "
    assert [line for line in lines if line.startswith(waits)]
