"""What listens for a Ray of this process, and what answers there to somebody without its token."""

import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass

from ray_jobs.cluster import connection  # noqa: F401  (before Ray is imported)

# isort: split
import grpc
import ray  # noqa: F401  (brings psutil)

# isort: split
import psutil

# A call of each service that reads what was given to Ray or runs code, by what it would do.
CALLS = {
    "read the key-value store": "InternalKVGcsService/InternalKVKeys",
    "start a job": "JobInfoGcsService/AddJob",
    "lease a worker": "NodeManagerService/RequestWorkerLease",
    "run a task": "CoreWorkerService/PushTask",
    "take objects": "ObjectManagerService/Pull",
    "trace a process": "ReporterService/GetTraceback",
}
PAGES = ("/api/job_agent/jobs/", "/get_or_create_runtime_env", "/logs", "/nodes")
_SECONDS = 30.0  # of a machine that has much else to do
_NOT_THERE = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)


@dataclass(frozen=True)
class Listener:
    """A port and the address it is bound to."""

    process: str
    host: str
    port: int


def listeners_of_this_process() -> list[Listener]:
    """Of this process and those that it and they have started."""
    found = []
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        try:
            bound = [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            found += [Listener(process.name(), address.ip, address.port) for address in bound]
        except psutil.NoSuchProcess:
            continue
    return found


def is_loopback(host: str) -> bool:
    return host == "::1" or host.removeprefix("::ffff:").startswith("127.")


def answers(host: str, port: int) -> bool:
    """Whether anything takes a connection there."""
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


def calls_without_token(listeners: Iterable[Listener]) -> dict[str, list[str]]:
    """By what a call would do, how the ports that know it answer to a caller without token."""
    found: dict[str, list[str]] = {what: [] for what in CALLS}
    for listener in listeners:
        with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
            for what, call in CALLS.items():
                try:
                    channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=_SECONDS)
                except grpc.RpcError as error:
                    if error.code() not in _NOT_THERE:
                        found[what].append(error.code().name)
                else:
                    found[what].append("OK")
    return found


def pages_without_token(listeners: Iterable[Listener]) -> list[int]:
    """The answers of ports that know HTTP, except of those that only give measurements (any page is theirs)."""
    found = []
    for listener in listeners:
        root = f"http://127.0.0.1:{listener.port}"
        if _status(f"{root}/nothing-of-that-name") == 200:
            continue
        found += [status for page in PAGES if (status := _status(f"{root}{page}", b"{}"))]
    return found


def _status(address: str, data: bytes | None = None) -> int:
    """The status of an answer; 0 where nothing speaks HTTP."""
    try:
        with urllib.request.urlopen(address, data, timeout=_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0
