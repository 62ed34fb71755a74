"""Real Ray heads with ports and a folder of their own, and jobs submitted to them from the checkout."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.cluster.local import own_token

# isort: split
from ray.job_submission import JobSubmissionClient

from tests.support.paths import ROOT

START_SECONDS = 240.0
_BINARIES = Path(sys.executable).parent
_VARIABLES = {"RAY_worker_niceness": "0"}  # Ray's 15 starves the workers beside any other load


@dataclass(frozen=True)
class Ended:
    """A submitted job that has ended: what `ray job submit` printed and returned, and the job's own exit code."""

    output: str
    cli_code: int
    exit_code: int | None


@dataclass(frozen=True)
class Head:
    """A running head. address: its dashboard's; gcs: what RAY_ADDRESS names."""

    address: str
    gcs: str

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)

    def submit(self, name: str, *arguments: str) -> Ended:
        """`ray job submit` of a job file from the checkout, to its end. `name` becomes the job's id."""
        ended = self._submitted(name, *_FROM_HERE, *arguments)
        assert name in {job.submission_id for job in self.client.list_jobs()}, ended.stdout + ended.stderr
        return Ended(ended.stdout + ended.stderr, ended.returncode, self.client.get_job_info(name).driver_exit_code)

    def start(self, name: str, *arguments: str) -> None:
        """Submits a job and returns while it runs."""
        ended = self._submitted(name, "--no-wait", *_FROM_HERE, *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def _submitted(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Tried again while the head has no node's agent yet: on a busy machine it lists jobs long before."""
        tries: list[subprocess.CompletedProcess[str]] = []

        def taken() -> bool:
            tries.append(self.ray("job", "submit", "--submission-id", name, *arguments))
            return "No available agent" not in tries[-1].stdout + tries[-1].stderr

        wait_until(taken, START_SECONDS, "the head got no agent")
        return tries[-1]

    def ray(self, *arguments: str, variables: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        """The `ray` command against this head, with this process's variables and further ones."""
        environment = {**os.environ, "RAY_API_SERVER_ADDRESS": self.address, **variables}
        return subprocess.run(
            [str(_BINARIES / "ray"), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


_FROM_HERE = ("--working-dir", ".", "--runtime-env", "deploy/runtime_env.yaml", "--", "python")


@contextlib.contextmanager
def running_head(options: Sequence[str], variables: Mapping[str, str] = {}, gcs_port: int = 0) -> Iterator[Head]:
    """Starts a head with further options and variables of `ray start` and waits until it takes jobs.

    It asks for this process's token, which this process and the `ray` commands that it starts then give.
    """
    own_token()
    folder = Path(tempfile.mkdtemp(prefix="dj"))
    gcs, port, agent, client = free_ports(4)
    environment = {**os.environ, "PATH": f"{_BINARIES}{os.pathsep}{os.environ['PATH']}", **_VARIABLES, **variables}
    environment.pop("RAY_ADDRESS", None)
    ports = f"--port {gcs_port or gcs} --dashboard-port {port} --dashboard-agent-listen-port {agent}"
    command = f"{_BINARIES / 'ray'} start --head --block {ports} --ray-client-server-port {client} --temp-dir {folder}"
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command.split(), *options], stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
    try:
        head = Head(f"http://127.0.0.1:{port}", f"127.0.0.1:{gcs_port or gcs}")

        def answers() -> bool:
            assert process.poll() is None, (folder / "head.log").read_text()
            return _takes_jobs(head.address)

        wait_until(answers, START_SECONDS, "the head did not start")
        yield head
    finally:
        for number in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(is_so: Callable[[], bool], seconds: float, complaint: str) -> float:
    """Asks twice a second until it is so; returns the seconds that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, complaint
        time.sleep(0.5)
    return time.monotonic() - started


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


def _takes_jobs(address: str) -> bool:
    """Whether the dashboard answers and an agent, which starts later, lists jobs."""
    try:
        JobSubmissionClient(address).list_jobs()
    except (OSError, RuntimeError):
        return False
    return True
