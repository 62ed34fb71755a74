"""Ranking on several Ray workers, each with its own slice of the kb. A lost worker's slice is ranked again.

Two rounds: the golds' scores, which every slice needs, and the counts against them. Slices are read from the index in
the run; of a run in an object store every node has a copy of the whole index.
"""

from typing import Any

from ray_jobs.cluster.tasks import run_shares, start_share

# isort: split
from torch import Tensor

from dsmip.config import RankOptions
from dsmip.evaluation.ranked_model import RankedFiles
from dsmip.evaluation.ranking import NotRankable, Ranking, check_golds
from dsmip.evaluation.slices import merge_gold_scores, merge_rankings
from ray_jobs.cluster.workers import worker_device
from ray_jobs.terminal.display import Display


def rank_on_ray(stored: RankedFiles, workers: int, *, gpu: bool, options: RankOptions, display: Display) -> Ranking:
    """The same ranking as in one process, to the last count. A worker asks for one CPU and, with `gpu`, for one GPU.

    Raises NotRankable when a score is NaN, JobFailed when a slice fails, or is lost again and again.
    """
    numbers = {f"slice {number + 1}": number for number in range(workers)}
    golds: dict[str, Tensor] = run_shares(
        _gold_scores,
        {name: (stored, workers, number) for name, number in numbers.items()},
        gpu=gpu,
        display=display,
        expected=(NotRankable,),
    )
    gold_score_M, model = merge_gold_scores(list(golds.values())), stored.open()
    check_golds(gold_score_M, model.gold_row_M, model.index)
    shares = {name: (stored, workers, gold_score_M, options, number) for name, number in numbers.items()}
    ranked: dict[str, tuple[Ranking, list[str]]] = run_shares(
        _rank_slice, shares, gpu=gpu, display=display, expected=(NotRankable,)
    )
    for line in dict.fromkeys(line for _, notices in ranked.values() for line in notices):
        display.say(line)
    return merge_rankings([ranking for ranking, _ in ranked.values()], options.top_k)


def _gold_scores(stored: RankedFiles, num_slices: int, number: int, name: str, events: Any) -> Tensor:
    start_share(name, events)
    model = stored.open()
    return model.gold_scores(model.index.slice(number, num_slices), worker_device())


def _rank_slice(
    stored: RankedFiles,
    num_slices: int,
    gold_score_M: Tensor,
    options: RankOptions,
    number: int,
    name: str,
    events: Any,
) -> tuple[Ranking, list[str]]:
    """The slice's ranking and the notices of it."""
    start_share(name, events)
    model, notices = stored.open(), list[str]()
    index = model.index.slice(number, num_slices)
    return model.rank_slice(index, gold_score_M, worker_device(), options, notices.append), notices
