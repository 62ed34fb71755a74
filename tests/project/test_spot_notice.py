"""The notice that AWS gives of a spot machine's end reaches Ray."""

import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.cluster.ray_heads import free_ports, running_head
from tests.support.paths import ROOT

SCRIPT = ROOT / "deploy" / "spot_notice.py"
IN_USE = """
import json, subprocess, sys
import ray
from ray._private.state import state

address, *command = sys.argv[1:]
ray.init(address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Worker:
    def begun(self):
        return True

worker = Worker.remote()  # a node without work would end at once
ray.get(worker.begun.remote())
assert not state.get_draining_nodes()
done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
print(json.dumps([done.returncode, done.stdout, list(state.get_draining_nodes().values())]))
"""
stop_time: Callable[[str], datetime | None] = runpy.run_path(str(SCRIPT))["stop_time"]


class Metadata(BaseHTTPRequestHandler):
    """The metadata service of a machine: version 2, which answers nobody without a token of its own."""

    notice: str | None = None

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        self._answer(200 if self.path == "/latest/api/token" and seconds.isdigit() else 400, "secret")

    def do_GET(self) -> None:
        allowed = self.headers.get("X-aws-ec2-metadata-token") == "secret"
        known = self.path == "/latest/meta-data/spot/instance-action" and self.notice is not None
        self._answer(401 if not allowed else 200 if known else 404, self.notice or "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def metadata(notice: str | None) -> Iterator[str]:
    handler = type("Handler", (Metadata,), {"notice": notice})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _notice(end: datetime) -> str:
    return f'{{"action": "terminate", "time": "{end.strftime("%Y-%m-%dT%H:%M:%SZ")}"}}'


def test_the_time_of_the_notice_is_read() -> None:
    end = datetime(2026, 11, 22, 8, 22, 0, tzinfo=UTC)
    with metadata(_notice(end)) as service:
        assert stop_time(service) == end


@pytest.mark.parametrize("notice", [None, "<html>"])
def test_no_notice_is_none(notice: str | None) -> None:
    with metadata(notice) as service:
        assert stop_time(service) is None


def test_a_service_that_is_away_is_no_notice() -> None:
    with metadata(None) as service:
        pass
    assert stop_time(service) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_drains_the_node_of_the_machine() -> None:
    (port,) = free_ports(1)
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=100)
    address = f"127.0.0.1:{port}"
    with running_head(["--num-cpus", "1"], gcs_port=port), metadata(_notice(end)) as service:
        # the head's token is known to this process from now on
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", IN_USE, address, str(SCRIPT), address, "--service", service]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    code, said, (deadline,) = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert "this machine stops in" in said
    assert deadline / 1000 == pytest.approx(end.timestamp(), abs=30)
