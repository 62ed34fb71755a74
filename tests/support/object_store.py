"""A real S3 server (moto's) in a process of its own."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

BUCKET = "dsmip-tests"
_START_SECONDS = 60.0
_GET = re.compile(r'"GET /([^? ]+\.\w+) HTTP')


@dataclass(frozen=True)
class ObjectStore:
    """A running server with one bucket. `process` may be killed, to see what its clients say. log: of its requests."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def num_reads(self) -> Counter[str]:
        """How often each object was read so far, whole or in part, by URI."""
        return Counter(f"s3://{name}" for name in _GET.findall(self.log.read_text(encoding="utf-8")))

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}"


def variables(port: int, folder: Path) -> dict[str, str]:
    """What makes any S3 client, of this process or of those it starts, use the server; `folder` stays empty."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
    }


@contextmanager
def running_store(port: int) -> Iterator[ObjectStore]:
    """Starts the server, waits until it answers, and makes the bucket."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _made_bucket(port):
                assert process.poll() is None, f"the S3 server ended with {process.returncode}"
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.1)
            yield ObjectStore(port, process, Path(log.name))
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _made_bucket(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        return False
    return True
