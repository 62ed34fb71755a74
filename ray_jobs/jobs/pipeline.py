"""Work on actors through Ray Data: items go to actors that hold a model, results come back to the driver one by one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray_jobs.cluster import connection  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import ray
import ray.data

from dsmip.errors import ReportedError, UserError
from ray_jobs.cluster.events import Event
from ray_jobs.cluster.failures import JobFailed
from ray_jobs.cluster.resources import Request
from ray_jobs.cluster.tasks import Call, run_watched
from ray_jobs.terminal.display import Display

_MOST_BLOCKS = 4096  # of Ray Data; of more items each has several

Row = Mapping[str, Any]
Progress = tuple[int, int]
"""How many are done, of how many."""


def run_on_actors(
    kind: type,
    arguments: Sequence[Any],
    items: Sequence[dict[str, Any]],
    request: Request,
    take: Callable[[Row], Progress],
    display: Display,
    *,
    verbose: bool,
) -> None:
    """Calls actors for every item; a lost actor's items go to another one.

    Args:
        kind: the actors' class. They are made of `arguments` and the event queue, say by a `StepEvents` that they have
            started, and are called with one item, as columns of its fields; what they return `outcome` makes.
        items: of small fields; only they travel to the actors.
        request: how many actors there are and what each asks; its name is that of the work.
        take: called here with every result, in any order.
        display: shows progress.
        verbose: shows Ray Data's own log.

    Raises:
        ReportedError: an actor raised it.
        JobFailed: an actor failed in another way, or was lost again and again.
    """
    call = Call(partial(_run, kind, arguments, items, request, take, verbose), [request])
    for _, each in run_watched({request.name: call}, display):
        each.result()


def _run(
    kind: type,
    arguments: Sequence[Any],
    items: Sequence[dict[str, Any]],
    request: Request,
    take: Callable[[Row], Progress],
    verbose: bool,
    events: Any,
) -> None:
    _quieten(verbose)
    pipeline = ray.data.from_items([*items], override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        kind,
        fn_constructor_args=(*arguments, events),
        batch_size=1,
        num_cpus=request.cpu,
        num_gpus=request.gpu,
        compute=ray.data.ActorPoolStrategy(size=request.workers),
    )
    try:
        for row in pipeline.iter_rows():
            if row["failure"]:
                raise _error(request.name, row["failure"], row["exit_code"])
            events.push.remote(Event(request.name, *take(row), 0))
    except ray.exceptions.RayError as error:
        raise JobFailed(f"{request.name}: {error}", 1) from error


def outcome(work: Callable[[], Row], otherwise: Row) -> dict[str, list[Any]]:
    """What an actor returns of an item: the columns that `work` gives, or what went wrong.

    An error is a result: raised, Ray Data would try again what fails again, and log it at length.

    Args:
        work: makes a value for each column.
        otherwise: the values of these columns after an error.
    """
    failure, exit_code, found = "", 1, otherwise
    try:
        found = work()
    except ReportedError as error:
        failure, exit_code = str(error), error.exit_code
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    columns: Row = {**found, "failure": failure, "exit_code": exit_code}
    return {name: [value] for name, value in columns.items()}


def _error(name: str, message: str, exit_code: int) -> ReportedError:
    return UserError(message) if exit_code == UserError.exit_code else JobFailed(f"{name}: {message}", exit_code)


def _quieten(verbose: bool) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
