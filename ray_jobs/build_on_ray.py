"""Makes shards on a Ray cluster, whose nodes all see the release and the dataset's folder under the same paths."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from data_prep.build.runners import Result, Runner, Task, Tick
from ray_jobs.connection import connected

# isort: split
import ray

from dsmip.errors import ReportedError
from ray_jobs.failures import LOST_WORKERS, JobFailed
from ray_jobs.resources import Request, WaitingLine, check_feasible

_LOOK_SECONDS = 1.0


def _print(line: str) -> None:
    print(line, flush=True)


@contextmanager
def run_on_ray(num_workers: int, say: Callable[[str], None] = _print, *, verbose: bool = False) -> Iterator[Runner]:
    """A runner with `num_workers` tasks of one CPU at a time on the cluster of RAY_ADDRESS, or on a local one.

    say: gets a line from time to time while no task can begin.
    """
    request = Request("prepare", 1, 1, 0, most=num_workers)
    with connected(verbose=verbose):
        check_feasible([request])
        remote: Any = ray.remote(num_cpus=1, max_retries=LOST_WORKERS)(_run)

        def run(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
            if not tasks:
                return  # no node need be started
            waiting = iter(tasks)
            first = remote.remote(_Nothing())  # Ray begins tasks of one function in their order
            running = [remote.remote(task) for task in islice(waiting, num_workers)]
            line = WaitingLine({request.name: request}, say)
            while not ray.wait([first, *running], timeout=_LOOK_SECONDS)[0]:
                line({request.name})
            while running:
                done, running = ray.wait(running)
                running += [remote.remote(task) for task in islice(waiting, len(done))]
                for reference in done:
                    result, count = _result(reference)
                    tick(count)
                    yield result

        yield run


class _Nothing:
    """A task that has ended as soon as it has begun."""

    def run(self, tick: Tick) -> None:
        """Does nothing."""


def _run(task: Task[Result]) -> tuple[Result, int]:
    """What the task made, and of how many items."""
    count = 0

    def tick(items: int) -> None:
        nonlocal count
        count += items

    return task.run(tick), count


def _result(reference: "ray.ObjectRef[tuple[Result, int]]") -> tuple[Result, int]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError | ReportedError):
            raise error.cause from None
        raise JobFailed(f"a shard could not be made: {error.cause!r}", 1) from error
    except ray.exceptions.RayError as error:
        raise JobFailed(f"a shard could not be made: {error}; run the command again to go on", 1) from error
