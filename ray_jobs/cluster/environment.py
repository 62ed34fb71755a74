"""Ray's environment variables: what it does, where it listens, who is let in. Import this before Ray."""

import os
import sys
from pathlib import Path

# What Ray should do unless the user said otherwise. Ray hands these on to its workers.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes Ray upload the folder and build another venv
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Train reports at most about once per interval
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker comes twice
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a call after shutdown starts another cluster
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning make a shared machine ten times slower
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints its configuration whatever its verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # csv, json and tensorboard files of every trial
}
# Ray replaces a node's address 127.0.0.1 by the machine's own, unless it takes the system for one without clusters.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def starts_own_cluster() -> bool:
    """Whether the cluster lives and dies with this process, as no address of another one was given."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def _prepare_environment() -> None:
    """Sets what Ray reads when it is imported: where it listens, and who is let in."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules:  # a worker, or a caller who has chosen
        return
    if starts_own_cluster():
        os.environ.update(_LOOPBACK, RAY_AUTH_MODE="token")
        return
    if os.environ["RAY_ADDRESS"].startswith(("127.", "localhost:")):
        os.environ.update(_LOOPBACK)
    if any(os.environ.get(name) for name in _TOKEN_VARIABLES) or Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


_prepare_environment()
