"""Ray's environment variables and the connection to a cluster. Import this before anything imports Ray."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dsmip.errors import UserError

# What Ray should do unless the user said otherwise. Ray hands these on to its workers.
_VARIABLES = {
    "RAY_AUTH_MODE": "disabled",  # unset, Ray writes a token file and later connections fail obscurely
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes Ray upload the folder and build another venv
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Train reports at most about once per interval
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker comes twice
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a call after shutdown starts another cluster
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning make a shared machine ten times slower
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints its configuration whatever its verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # csv, json and tensorboard files of every trial
}
# For a cluster that lives and dies with this process.
_LOCAL_VARIABLES = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less per training: nobody takes this node away
    "RAY_worker_maximum_startup_concurrency": "16",  # a training's helpers start at once; fewer make Ray warn
}
for _name, _value in _VARIABLES.items():
    os.environ.setdefault(_name, _value)

_OBJECT_STORE_BYTES = 200 << 20  # of a local cluster: tables are shared as files, not as objects


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), or starts a local one and stops it afterwards.

    A cluster that this process is connected to already is used as it is. `verbose` shows Ray's own log.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    if starts_own_cluster():
        _start_local(verbose=verbose, level=level)
    else:
        ray.init(log_to_driver=verbose, logging_level=level)
    if not verbose:
        logging.getLogger("ray").setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def starts_own_cluster() -> bool:
    """Whether the cluster lives and dies with this process, as no address of another one was given."""
    return not os.environ.get("RAY_ADDRESS")


def _start_local(*, verbose: bool, level: int) -> None:
    """Starts Ray in this process; once more when a busy machine took longer than Ray's fixed 30 s.

    Raises UserError when it does not start the second time either.
    """
    import ray

    for name, value in _LOCAL_VARIABLES.items():
        os.environ.setdefault(name, value)
    for last in (False, True):
        try:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=verbose,
                logging_level=level,
            )
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if last:
                raise UserError(f"Ray did not start on this machine (is it overloaded?): {error}") from error
