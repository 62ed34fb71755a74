"""Ranking on several Ray workers, each with its own slice of the kb. A lost worker's slice is ranked again.

Two rounds: the golds' scores, which every slice needs, and the counts against them. Slices are read from the index in
the run's folder, which all nodes must share.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray_jobs.environment import connected

# isort: split
import ray
from torch import Tensor

from dsmip.evaluation import NotRankable, Ranking, check_golds, merge_gold_scores, merge_rankings
from dsmip.rank_options import RankOptions
from dsmip.ranked_model import RankedFiles
from ray_jobs.context import StepEvents, set_threads, worker_device
from ray_jobs.failures import JobFailed
from ray_jobs.progress import Display, run_watched, start_event_queue
from ray_jobs.resources import Request, WaitingLine, check_feasible

_LOST_WORKERS = 3  # how many times a slice is ranked again after its process was lost


def rank_on_ray(
    stored: RankedFiles, workers: int, *, gpu: bool, options: RankOptions, display: Display, verbose: bool = False
) -> Ranking:
    """The same ranking as in one process, to the last count. A worker asks for one CPU and, with `gpu`, for one GPU.

    Raises UserError when the cluster can never give that, NotRankable when a score is NaN, JobFailed when a slice
    fails, or is lost again and again.
    """
    with connected(verbose=verbose):
        check_feasible([Request("evaluate", workers, 1, int(gpu))])
        on_slices = partial(_on_slices, workers=workers, gpu=gpu, display=display)
        golds: list[Tensor] = on_slices(_gold_scores, stored, workers)
        gold_score_M, model = merge_gold_scores(golds), stored.open()
        check_golds(gold_score_M, model.gold_row_M, model.index)
        ranked: list[tuple[Ranking, list[str]]] = on_slices(_rank_slice, stored, workers, gold_score_M, options)
        for line in dict.fromkeys(line for _, notices in ranked for line in notices):
            display.say(line)
        return merge_rankings([ranking for ranking, _ in ranked], options.top_k)


def _gold_scores(stored: RankedFiles, num_slices: int, number: int, events: Any) -> Tensor:
    _say_started(number, events)
    model = stored.open()
    return model.gold_scores(model.index.slice(number, num_slices), worker_device())


def _rank_slice(
    stored: RankedFiles, num_slices: int, gold_score_M: Tensor, options: RankOptions, number: int, events: Any
) -> tuple[Ranking, list[str]]:
    """The slice's ranking and the notices of it."""
    _say_started(number, events)
    model, notices = stored.open(), list[str]()
    index = model.index.slice(number, num_slices)
    return model.rank_slice(index, gold_score_M, worker_device(), options, notices.append), notices


def _say_started(number: int, events: Any) -> None:
    set_threads()
    StepEvents(_name(number), 1, events)


def _name(number: int) -> str:
    return f"slice {number + 1}"


def _on_slices(work: Callable[..., Any], *given: Any, workers: int, gpu: bool, display: Display) -> list[Any]:
    """What `work(*given, slice number, events)` says of each slice; a line every 30 s names those that wait."""
    events = start_event_queue()
    task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=_LOST_WORKERS)(work)
    calls = {_name(number): partial(_result, task, given, number, events) for number in range(workers)}
    waiting = WaitingLine({name: Request(name, 1, 1, int(gpu)) for name in calls}, display.say)
    results: dict[str, Any] = {}
    with display:
        for name, call in run_watched(calls, events, display, lambda running: waiting(running - display.started)):
            results[name] = call.result()
    return [results[name] for name in calls]


def _result(task: Any, given: Sequence[Any], number: int, events: Any) -> Any:
    try:
        return ray.get(task.remote(*given, number, events))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NotRankable):
            raise error.cause from None
        raise JobFailed(f"ranking {_name(number)} of the kb failed: {error.cause!r}", 1) from error
    except ray.exceptions.RayError as error:
        raise JobFailed(f"ranking {_name(number)} of the kb failed: {error}", 1) from error
