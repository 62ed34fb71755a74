"""Work on a Ray cluster, watched: calls side by side, what is shown of them, and the errors of tasks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

from ray_jobs.cluster import connection  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import ray

from dsmip.errors import ReportedError
from ray_jobs.cluster.events import StepEvents, start_event_queue
from ray_jobs.cluster.failures import LOST_WORKERS, JobFailed
from ray_jobs.cluster.resources import Request, WaitingLine
from ray_jobs.cluster.workers import set_threads
from ray_jobs.terminal.display import Display

_LOOK_SECONDS = 0.3
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A blocking call into Ray that is watched while it runs.

    Attributes:
        run: the call; it gets the event queue that its workers push to.
        requests: what it asks of the cluster. It waits until an event of one of their names has come.
    """

    run: Callable[[Any], Result]
    requests: Sequence[Request]


def run_watched(calls: Mapping[str, Call[Result]], display: Display) -> Iterator[tuple[str, "Future[Result]"]]:
    """Runs calls side by side in threads of this process; yields each by name when it has ended.

    Meanwhile their workers' events go to the display, and a line every 30 s names those that wait.
    """
    events = start_event_queue()
    requests = [request for call in calls.values() for request in call.requests]
    waiting_line = WaitingLine({request.name: request for request in requests}, display.say)
    pool = ThreadPoolExecutor(max(len(calls), 1))
    with display:
        running = {pool.submit(call.run, events): name for name, call in calls.items()}
        try:
            while running:
                finished, _ = wait(running, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                _show(ray.get(events.drain.remote()), display)
                for future in finished:
                    yield running.pop(future), future
                waiting_line(_waiting([calls[name] for name in running.values()], display.started))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # interrupted calls end when the connection to Ray closes


def _show(events: Iterable[Any], display: Display) -> None:
    for event in events:
        if event.note:
            display.say(f"  {event.name}: {event.note}")
        else:
            display.show_steps(event.name, event.done, event.total, event.epoch, event.metrics)


def _waiting(running: Iterable[Call[Any]], started: set[str]) -> set[str]:
    """Names of the requests of those calls that have not started."""
    asked = ({request.name for request in call.requests} for call in running)
    return {name for names in asked if not names & started for name in names}


def run_shares(
    work: Callable[..., Result],
    shares: Mapping[str, Sequence[Any]],
    *,
    cpu: float = 1,
    gpu: float = 0,
    display: Display,
    expected: tuple[type[Exception], ...] = (),
) -> dict[str, Result]:
    """Runs `work(*share, name, events)` of every share as a Ray task; a lost worker's share is done again.

    Args:
        work: calls `start_share` first.
        shares: the arguments by name.
        cpu: CPUs of each task.
        gpu: GPUs of each task.
        display: shows the tasks' progress.
        expected: errors of `work` that are raised as they are, as reported ones always are.

    Returns:
        What `work` returned, by name.

    Raises:
        JobFailed: a share failed in another way, or was lost again and again.
    """
    task = ray.remote(num_cpus=cpu, num_gpus=gpu, max_retries=LOST_WORKERS)(work)

    def run(name: str, events: Any) -> Any:
        return result_of(task.remote(*shares[name], name, events), f"{name} failed", expected)

    calls: dict[str, Call[Result]] = {name: Call(partial(run, name), [Request(name, 1, cpu, gpu)]) for name in shares}
    results = {name: call.result() for name, call in run_watched(calls, display)}
    return {name: results[name] for name in shares}


def start_share(name: str, events: Any) -> StepEvents:
    """To be called first in a worker: sets its threads and says that the share has begun."""
    set_threads()
    return StepEvents(name, 1, events)


def run_each(
    work: Callable[[Item], Result], items: Iterable[Item], request: Request, say: Callable[[str], None], failed: str
) -> Iterator[Result]:
    """Runs `work` of every item as a Ray task, at most `request.most` at a time; yields results in any order.

    Args:
        work: a function of a module, or what else can be pickled.
        items: taken one by one as tasks end.
        request: what a task asks; `most` is the number of tasks at a time.
        say: gets a line every 30 s while no task can begin.
        failed: how the message of a JobFailed begins.
    """
    task: Any = ray.remote(num_cpus=request.cpu, num_gpus=request.gpu, max_retries=LOST_WORKERS)(_apply)
    left = iter(items)
    first = task.remote(None, None)  # Ray begins tasks of one function in their order
    running = [task.remote(work, item) for item in islice(left, request.most)]
    waiting_line = WaitingLine({request.name: request}, say)
    while not ray.wait([first, *running], timeout=_LOOK_SECONDS)[0]:
        waiting_line({request.name})
    while running:
        done, running = ray.wait(running)
        running += [task.remote(work, item) for item in islice(left, len(done))]
        for reference in done:
            yield result_of(reference, failed, (OSError,))


def _apply(work: Callable[[Item], Result] | None, item: Item) -> Result | None:
    return None if work is None else work(item)


def result_of(reference: Any, failed: str, expected: tuple[type[Exception], ...] = ()) -> Any:
    """The result of a Ray task.

    Raises:
        ReportedError: the task raised it, or one of `expected`: they are raised as they are.
        JobFailed: the task failed in another way, or its process was lost; the message begins with `failed`.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: Exception = error.cause
        if isinstance(cause, (ReportedError, *expected)):
            raise cause from None
        raise JobFailed(f"{failed}: {type(cause).__name__}: {cause}", 1) from error
    except ray.exceptions.RayError as error:
        raise JobFailed(f"{failed}: {error}; run the command again to go on", 1) from error
