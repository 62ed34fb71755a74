"""The connection to a cluster. Import this before anything imports Ray: it sets Ray's variables."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray_jobs.cluster.environment import starts_own_cluster
from ray_jobs.terminal.lines import complain


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), or starts a local one and stops it afterwards.

    A cluster that this process is connected to already is used as it is. `verbose` shows Ray's own log. A line on
    stderr says that a local one starts: that takes seconds, on a busy machine many.

    Raises:
        UserError: RAY_ADDRESS names no cluster that takes this process, or the local one does not start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    if starts_own_cluster():
        complain("  starting Ray on this machine ...")
        from ray_jobs.cluster.local import start_local

        start_local(log_to_driver=verbose, logging_level=level)
    else:
        from ray_jobs.cluster.joining import join

        join(os.environ["RAY_ADDRESS"], log_to_driver=verbose, logging_level=level)
    if not verbose:
        logging.getLogger("ray").setLevel(level)
    try:
        yield
    finally:
        ray.shutdown()


def check_cluster() -> None:
    """Checks the cluster of RAY_ADDRESS, before long work that comes first.

    Raises:
        UserError: It names no cluster that takes this process.
    """
    if not starts_own_cluster():
        from ray_jobs.cluster.joining import check_address

        check_address(os.environ["RAY_ADDRESS"])
