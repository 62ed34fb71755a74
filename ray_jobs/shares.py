"""Work divided over several Ray workers of one CPU, and perhaps one GPU, each. A lost worker's share is done again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray_jobs.connection import connected  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import ray

from dsmip.errors import ReportedError
from dsmip.ranking import NotRankable
from ray_jobs.events import StepEvents, start_event_queue
from ray_jobs.failures import LOST_WORKERS, JobFailed
from ray_jobs.progress import Display, run_watched
from ray_jobs.resources import Request, WaitingLine
from ray_jobs.workers import set_threads


def start_share(name: str, events: Any) -> StepEvents:
    """To be called first in a worker: sets its threads and says that the share has begun."""
    set_threads()
    return StepEvents(name, 1, events)


def run_shares(
    work: Callable[..., Any], shares: Mapping[str, Sequence[Any]], *, gpu: bool, display: Display
) -> dict[str, Any]:
    """What `work(*share, name, events)` returns of each share, by name; a line every 30 s names those that wait.

    Raises what says that a user or the data is at fault (a ReportedError, NotRankable) as it is, JobFailed when a share
    fails in another way, or is lost again and again.
    """
    events = start_event_queue()
    task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=LOST_WORKERS)(work)
    calls = {name: partial(_result, task, share, name, events) for name, share in shares.items()}
    waiting = WaitingLine({name: Request(name, 1, 1, int(gpu)) for name in calls}, display.say)
    results: dict[str, Any] = {}
    with display:
        for name, call in run_watched(calls, events, display, lambda running: waiting(running - display.started)):
            results[name] = call.result()
    return {name: results[name] for name in shares}


def _result(task: Any, share: Sequence[Any], name: str, events: Any) -> Any:
    try:
        return ray.get(task.remote(*share, name, events))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NotRankable | ReportedError):
            raise error.cause from None
        raise JobFailed(f"{name} failed: {error.cause!r}", 1) from error
    except ray.exceptions.RayError as error:
        raise JobFailed(f"{name} failed: {error}", 1) from error
