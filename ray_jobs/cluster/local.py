"""A Ray that lives and dies with this process: on the loopback interface alone, with a token and a folder of its own.

Whoever reaches a Ray without token runs code as its user, and Ray listens on every interface and keeps what it is given
in a folder that all may read. Here it is bound to 127.0.0.1, asks everybody for a random token in a file that only this
user can read, and writes to a private folder.
"""

import atexit
import os
import secrets
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from dsmip.errors import UserError
from ray_jobs.cluster import environment  # noqa: F401  (first: Ray reads its variables when it is imported)
from ray_jobs.cluster.scratch import Scratch, default_root

# isort: split
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.services import get_node_ip_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# For a cluster that lives and dies with this process; its workers inherit them.
_VARIABLES = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per training: nobody takes this node away
    "RAY_worker_maximum_startup_concurrency": "16",  # a training's helpers start at once; fewer make Ray warn
    "GLOO_SOCKET_IFNAME": _LOOPBACK,  # where workers of one training listen for each other
    "NCCL_SOCKET_IFNAME": _LOOPBACK,
}
_OBJECT_STORE_BYTES = 200 << 20  # tables are shared as files, not as objects
_SOCKET = "/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # below Ray's folder; its longest
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of a UNIX socket's path


def start_local(**options: Any) -> None:
    """Starts Ray in this process; once more when a busy machine took longer than Ray's fixed 30 s.

    Args:
        options: further ones of `ray.init`.

    Raises:
        UserError: it does not start the second time either, or Ray was imported before `ray_jobs`, so that it would
            listen to everybody.
    """
    if not (is_token_auth_enabled() and get_node_ip_address() in ("127.0.0.1", "::1")):
        raise UserError(
            "Ray was imported before ray_jobs.cluster.connection, and would be open to other users; import it first"
        )
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    folder = own_folder()
    own_token()
    for last in (False, True):
        try:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "r"),  # Ray opens it to all; nobody else comes through the folder above it
                **options,
            )
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if last:
                raise UserError(f"Ray did not start on this machine (is it overloaded?): {error}") from error


@cache
def own_folder() -> Path:
    """A private folder for the Ray of this process; removed when the process ends, or by a later one."""
    scratch = Scratch(_root())
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked process
            scratch.remove()

    atexit.register(remove)
    return scratch.home


@cache
def own_token() -> Path:
    """The file with the token that this process's Ray asks for, made anew for it; Ray finds it from now on."""
    path = own_folder() / "token"
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would count more than the file, and be another cluster's
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    AuthenticationTokenLoader.instance().reset_cache()
    return path


def _root() -> Path:
    """Where this user's processes have their folders: in the temporary one if sockets' paths fit, else in /tmp."""
    root = default_root(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    longest = len(os.fsencode(f"{root}/worker-12345678/r{_SOCKET.format(pid=os.getpid())}"))
    return root if longest <= _LONGEST_SOCKET else default_root("/tmp")
