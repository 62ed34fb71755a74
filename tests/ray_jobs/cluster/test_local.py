"""A local Ray is for its user alone: where it listens, what it asks, and who reads its folder."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.cluster.connection import connected
from ray_jobs.cluster.local import own_folder, own_token
from tests.support.cluster.reached import (
    CALLS,
    calls_without_token,
    is_loopback,
    listeners_of_this_process,
    pages_without_token,
)
from tests.support.paths import ROOT

# isort: split
import ray

NOBODY = 65534
ATTACK = """
import os, sys
import grpc
from ray.core.generated import gcs_service_pb2 as messages
address, token, folder = sys.argv[1:]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def code(metadata=()):
    call = grpc.insecure_channel(address).unary_unary(
        "/ray.rpc.InternalKVGcsService/InternalKVKeys",
        request_serializer=messages.InternalKVKeysRequest.SerializeToString,
        response_deserializer=messages.InternalKVKeysReply.FromString,
    )
    try:
        asked = messages.InternalKVKeysRequest(namespace=b"session")
        return f"read {len(call(asked, metadata=metadata, timeout=30).results)} keys"
    except grpc.RpcError as error:
        return error.code().name
def opened(action):
    try:
        action()
        return "opened"
    except OSError as error:
        return type(error).__name__
print(code(), code([("authorization", "Bearer " + "0" * 64)]))
print(opened(lambda: open(token)), opened(lambda: os.listdir(folder)))
"""
ALONE = """
import os, sys
from ray_jobs.cluster.connection import connected
from tests.support.cluster.reached import answers, listeners_of_this_process
import ray
import psutil
with connected():
    @ray.remote
    class Actor:
        def pid(self):
            return os.getpid()
    actor = Actor.remote()
    assert ray.get(actor.pid.remote()) != os.getpid()
    ports = {each.laddr.port for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    assert {each.port for each in listeners_of_this_process()} <= ports
    print(len(ports), sorted(port for port in ports if answers("127.0.0.1", port)) == sorted(ports))
    print([port for port in ports if answers("198.51.100.7", port)])
"""
OWN_NETWORK = "ip link set lo up && ip address add 198.51.100.7/32 dev lo && exec"


def _process() -> int:
    return os.getpid()


def test_its_ports_are_bound_to_the_loopback_address(ray_cluster: None) -> None:
    listeners = listeners_of_this_process()
    names = {listener.process.split(":")[-1] for listener in listeners}
    assert {"gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent"} <= names
    assert [listener for listener in listeners if not is_loopback(listener.host)] == []


def test_nothing_is_read_or_run_without_the_token(ray_cluster: None) -> None:
    assert ray.get(ray.remote(_process).remote()) != os.getpid()  # a worker is there
    listeners = listeners_of_this_process()
    found = calls_without_token(listeners)
    assert {what: set(answers) for what, answers in found.items()} == {what: {"UNAUTHENTICATED"} for what in CALLS}
    assert set(pages_without_token(listeners)) == {401}


def test_its_folder_and_token_are_private_and_no_log_holds_the_token(ray_cluster: None) -> None:
    folder, token = own_folder(), own_token()
    for path, mode in ((folder.parent, 0o700), (folder, 0o700), (token, 0o600)):
        found = os.lstat(path)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, os.getuid())
        assert not stat.S_ISLNK(found.st_mode)
    secret = token.read_bytes()
    assert len(secret) == 64
    assert secret.decode() not in os.environ.values()
    session = (Path(ray.get_runtime_context().get_temp_dir()) / "session_latest").resolve()
    assert folder in session.parents
    files = [path for path in session.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if secret in path.read_bytes()] == []
    sockets = [path for path in session.rglob("*") if path.is_socket()]
    assert {path.name for path in sockets} == {"raylet", "plasma_store"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_reads_nothing(ray_cluster: None) -> None:
    arguments = [ray.get_runtime_context().gcs_address, str(own_token()), str(own_folder())]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    done = subprocess.run([sys.executable, "-c", ATTACK, *arguments], capture_output=True, text=True, env=variables)
    assert done.stdout.split() == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PermissionError", "PermissionError"], done


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_none_of_its_ports_answers_at_another_address() -> None:
    """In a network of its own, where nothing else listens, and the machine has one address more."""
    network = ["unshare", "--net", "sh", "-c"]
    tried = subprocess.run([*network, f"{OWN_NETWORK} true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no network of its own: {tried.stderr.decode()}")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*network, f'{OWN_NETWORK} "$0" "$@"', sys.executable, "-c", ALONE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=280)
    assert done.returncode == 0, done.stderr
    counted, answered = done.stdout.splitlines()
    number, all_answer_here = counted.split()
    assert int(number) > 5
    assert all_answer_here == "True"
    assert answered == "[]"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_temporary_folder_of_a_long_name_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    """Ray's sockets would have names that no system takes; and what it wrote is gone when it has ended."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    code = (
        "from ray_jobs.cluster.connection import connected\n"
        "from ray_jobs.cluster.local import own_folder\n"
        "with connected():\n    print(own_folder(), own_folder().is_dir())"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["TMPDIR"] = str(long)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    folder, was_there = done.stdout.split()
    assert was_there == "True"
    assert not Path(folder).exists()
    assert not Path(folder).with_suffix(".lock").exists()


def test_ray_that_was_imported_before_is_not_started_open() -> None:
    code = (
        "import ray\n"
        "from ray_jobs.cluster.connection import connected\n"
        "from dsmip.errors import UserError\n"
        "try:\n    connected().__enter__()\n"
        "except UserError as error:\n    print(error, ray.is_initialized())"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert "open to other users; import it first False" in done.stdout, done
    assert done.stderr == "  starting Ray on this machine ...\n"  # said before the seconds that it takes


def test_connected_uses_the_cluster_that_is_there(ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    with connected():
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert capsys.readouterr() == ("", "")
