"""The way to a cluster: a real head with ports of its own, and a job file submitted to it from the checkout."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_jobs.environment  # noqa: F401  (before Ray is imported)
from dsmip.config import ExperimentConfig, merged
from dsmip.runs import Run
from dsmip.shards import Dataset

ROOT = Path(__file__).parents[1]
START_SECONDS = 90.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processes_of(folder: Path) -> list[int]:
    """Ids of processes that name the folder on their command line: a head's, wherever they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Address of a running head's dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="dj"))
    gcs, port, agent, client = free_ports(4)
    binaries = Path(sys.executable).parent
    variables = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    variables.pop("RAY_ADDRESS", None)
    ports = (
        f"--port {gcs} --dashboard-port {port} --dashboard-agent-listen-port {agent} --ray-client-server-port {client}"
    )
    command = f"{binaries / 'ray'} start --head --block {ports} --temp-dir {folder} --num-cpus 2"
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command.split(), stdout=log, stderr=log, env=variables, cwd=folder, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
                break
            except OSError:
                assert head.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < deadline, "the head did not start"
                time.sleep(0.5)
        yield address
    finally:
        for process in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def submit(dashboard: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` from the checkout. A head that has just started may have no agent yet: tried again then."""
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--working-dir", ".", "--", "python", *arguments]
    variables = {**os.environ, "RAY_API_SERVER_ADDRESS": dashboard}
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400, check=False
        )
        if "No available agent" not in ended.stdout + ended.stderr or time.monotonic() > deadline:
            return ended


def test_a_submitted_training_succeeds_and_a_wrong_one_says_why(
    dashboard: str, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    experts = {name: small_config.system.experts[name] for name in ("text", "multimodal")}  # type: ignore[attr-defined]
    system = small_config.system.model_copy(update={"experts": experts, "use": ("text", "multimodal")})
    config = merged(small_config, {"train": {"epochs": 1}, "system": small_config.system})
    path = tmp_path / "config.yaml"
    path.write_text(config.model_copy(update={"system": system}).to_yaml())
    options = ["--config", str(path), "--data", str(small_data.folder), "--run", str(tmp_path / "run")]

    ended = submit(dashboard, "ray_jobs/train_experts.py", *options)
    assert "succeeded" in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0
    run = Run.open(tmp_path / "run")
    assert [part for part in run.part_names if run.is_finished(part)] == ["text", "multimodal"]

    ended = submit(dashboard, "ray_jobs/train_experts.py", *options, "--set", "train.epocs=1")
    assert ended.returncode == 1
    assert "did you mean 'epochs'" in ended.stdout
    assert "exit code 2" in ended.stdout + ended.stderr
