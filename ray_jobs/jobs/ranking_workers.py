"""Workers on Ray that build the files of a ranking, and rank: what `dsmip evaluate --workers` uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dsmip.data.table import Table
from dsmip.evaluation.experts.survey import (
    Statistics,
    best_rows,
    cross_scores,
    merged_statistics,
    slice_statistics,
    survey_of,
)
from dsmip.evaluation.index_builder import RankingFiles
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import NotRankable, Ranking, check_golds, merge_gold_scores, merge_rankings
from dsmip.evaluation.report import NO_COLUMNS
from dsmip.ops.experts.statistics import Survey
from dsmip.rank_options import RankOptions
from ray_jobs.terminal.display import Display

if TYPE_CHECKING:
    from ray_jobs.cluster.events import StepEvents

Result = TypeVar("Result")


class RayWorkers:
    """Workers on Ray that build slices of the index, and rank them, each on its own device.

    Each opens the run and the model once for its share; a lost worker's share is done again, but for the files that it
    had finished. They rank in two rounds: the golds' scores, which every slice needs, and the counts against them.
    """

    def __init__(self, num_workers: int, gpu: bool, options: RankOptions, display: Display) -> None:
        """
        Args:
            num_workers: each asks for one CPU.
            gpu: and for one GPU.
            options: how they rank.
            display: shows their progress.
        """
        self._num_workers, self._gpu, self._options, self._display = num_workers, gpu, options, display

    def build(self, files: RankingFiles) -> None:
        """Builds the missing files.

        Raises:
            UserError: the data set is damaged.
            JobFailed: a worker fails, or is lost again and again.
        """
        missing, num_workers = list(files.missing), self._num_workers
        shares = {f"builder {number + 1}": (files, missing[number::num_workers]) for number in range(num_workers)}
        begun = {name: share for name, share in shares.items() if share[1]}
        if begun:
            self._display.say(f"  building {len(missing)} missing files of the index on {len(begun)} workers")
            self._run(_build, begun)

    def survey(self, files: RankingFiles) -> Survey:
        """What experts say of each mention, in two rounds: their statistics, and scores of each other's best entities.

        Raises:
            NotRankable: a score is NaN.
            JobFailed: a slice fails, or is lost again and again.
        """
        num_slices, numbers = self._num_workers, self._slices
        shares = {name: (files, num_slices, self._options, n) for name, n in numbers.items()}
        found = merged_statistics(list(self._run(_statistics, shares).values()))
        row_MB = best_rows(found)
        crossed = {name: (files, num_slices, self._options, row_MB, n) for name, n in numbers.items()}
        cross = self._run(_cross_scores, crossed)
        return survey_of(found, list(cross.values()))

    def rank(self, files: RankingFiles, added: Table = NO_COLUMNS) -> Ranking:
        """The same ranking as in one process, to the last count.

        Raises:
            NotRankable: a score is NaN.
            JobFailed: a slice fails, or is lost again and again.
        """
        num_slices, numbers = self._num_workers, self._slices
        shares = {name: (files, num_slices, added, self._options, n) for name, n in numbers.items()}
        golds = self._run(_gold_scores, shares)
        gold_score_M = merge_gold_scores(list(golds.values()))
        check_golds(gold_score_M, files.gold_row_M, range(sum(map(len, files.slices.values()))))
        slices = {name: (files, num_slices, added, gold_score_M, self._options, n) for name, n in numbers.items()}
        ranked: dict[str, tuple[Ranking, list[str]]] = self._run(_rank_slice, slices)
        for line in dict.fromkeys(line for _, notices in ranked.values() for line in notices):
            self._display.say(line)
        return merge_rankings([ranking for ranking, _ in ranked.values()], self._options.top_k)

    @property
    def _slices(self) -> dict[str, int]:
        """Numbers of the kb's slices by name, one per worker."""
        return {f"slice {number + 1}": number for number in range(self._num_workers)}

    def _run(self, work: Callable[..., Result], shares: Mapping[str, Sequence[Any]]) -> dict[str, Result]:
        from ray_jobs.cluster.tasks import run_shares  # imports Ray, which one worker does without

        return run_shares(work, shares, gpu=self._gpu, display=self._display, expected=(NotRankable,))


def _build(files: RankingFiles, names: Sequence[str], name: str, events: Any) -> None:
    device, step_events = _started(name, events)
    files.storage.pull("")  # of a lost worker, perhaps on another node
    files.build(names, device, lambda what, done, total: step_events.step_done(0, done - 1, total))
    step_events.epoch_done({"epoch": 0})


def _statistics(
    files: RankingFiles, num_slices: int, options: RankOptions, number: int, name: str, events: Any
) -> Statistics:
    device, _ = _started(name, events)
    model = files.open().ready(device, options, lambda line: None)
    return slice_statistics(model, model.index.slice(number, num_slices), device)


def _cross_scores(
    files: RankingFiles, num_slices: int, options: RankOptions, row_MB: Tensor, number: int, name: str, events: Any
) -> Tensor:
    device, _ = _started(name, events)
    model = files.open().ready(device, options, lambda line: None)
    return cross_scores(model, model.index.slice(number, num_slices), row_MB, device)


def _gold_scores(
    files: RankingFiles, num_slices: int, added: Table, options: RankOptions, number: int, name: str, events: Any
) -> Tensor:
    device, _ = _started(name, events)
    model = _opened(files, added).ready(device, options, lambda line: None)
    return model.gold_scores(model.index.slice(number, num_slices), device)


def _rank_slice(
    files: RankingFiles,
    num_slices: int,
    added: Table,
    gold_score_M: Tensor,
    options: RankOptions,
    number: int,
    name: str,
    events: Any,
) -> tuple[Ranking, list[str]]:
    """The slice's ranking and the notices of it."""
    device, _ = _started(name, events)
    model, notices = _opened(files, added), list[str]()
    index = model.index.slice(number, num_slices)
    return model.rank_slice(index, gold_score_M, device, options, notices.append), notices


def _opened(files: RankingFiles, added: Table) -> RankedModel:
    model = files.open()
    return replace(model, mentions=model.mentions.merged(added))


def _started(name: str, events: Any) -> tuple[torch.device, "StepEvents"]:
    """The device of this worker, and where it tells its progress."""
    from ray_jobs.cluster.tasks import start_share
    from ray_jobs.cluster.workers import worker_device

    step_events = start_share(name, events)
    return worker_device(), step_events
