"""From ranks to files and tables: `metrics.json`, `ranks.parquet`, and what several models' ranks say together."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsmip.calibration.evidence import NUM_SCORES
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors, link
from dsmip.evaluation.experts.survey import KeptScores, informed, needs_survey, surveyed
from dsmip.evaluation.groups import KIND, report_groups, rows_by_value
from dsmip.evaluation.index_builder import OpenedEvaluation, RankingFiles, plan_files
from dsmip.evaluation.metrics import adjusted, confidence, measure_among
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import Choices, NotRankable, Ranking
from dsmip.evaluation.stored.calibration import calibrated
from dsmip.evaluation.stored.layout import METRICS_FILE, RANKS, UNKNOWN, evaluation_name
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.evaluation.stored.writing import write_ranks, write_unknown
from dsmip.ops import ranking as ops
from dsmip.ops.experts.statistics import Survey
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.runs.run import Run

NO_COLUMNS = Table({})
_CANDIDATES_NOTE = "ranks among k candidates, a gold outside them counted as a miss: not metrics of the full ranking"


@dataclass(frozen=True)
class Evaluated:
    """Where a model's files are, and its metrics as they stand in `metrics.json`."""

    folder: Path
    metrics: dict[str, Any]


def recall_name(k: int) -> str:
    """The figure among candidates that says how many of the exact ranking's best `k` entities they hold."""
    return f"recall@{k}"


class RankingWorkers(Protocol):
    """Processes elsewhere that build what a ranking reads, and rank."""

    def build(self, files: RankingFiles) -> None:
        """Builds the missing files."""

    def survey(self, files: RankingFiles) -> Survey:
        """What the experts of a model that fuses them say of each mention, from all files."""

    def rank(self, files: RankingFiles, added: Table = NO_COLUMNS) -> Ranking:
        """The ranking from all files, and columns of the mentions that are in none."""


class SecondStage(Protocol):
    """What scores the best entities of a ranking once more.

    Attributes:
        candidates: How many of each mention.
    """

    @property
    def candidates(self) -> int: ...

    def __call__(self, first: Ranking) -> Ranking: ...

    def over(self, evaluation: OpenedEvaluation) -> "SecondStage":
        """The same of other mentions."""


def evaluate_model(
    evaluation: OpenedEvaluation,
    device: torch.device,
    *,
    second_stage: SecondStage | None = None,
    options: RankOptions = RankOptions(),
    candidates: int | None = None,
    workers: RankingWorkers | None = None,
    kept: KeptScores | None = None,
    notice: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> Evaluated:
    """Ranks the whole kb for every mention of a split and writes metrics.json and ranks.parquet.

    On the validation split it also calibrates the model (calibration.json); on others the metrics say how good the
    confidences are that this gives.

    Args:
        evaluation: the model and the split.
        device: of this process.
        second_stage: what re-ranks, for a model that has a re-ranker.
        options: how the ranking is computed here; `workers` have their own.
        candidates: also rank among so many candidates, in this process; their figures are a section of their own.
        workers: do the work (default: this process); with a second stage they keep as many best entities as it scores.
        kept: scores of the run's experts of the split's mentions, for other models that fuse them.
        notice: takes lines about how it is done.
        progress: of this process's work.

    Raises:
        UserError: a split without mentions, a model that scores NaN, or no candidates.
        ValueError: a model that re-ranks, without its second stage.
    """
    options = _checked_options(evaluation, second_stage, options, candidates)
    written, options = options.top_k, replace(options, top_k=max(options.top_k, NUM_SCORES + 1))
    files = plan_files(evaluation, notice=notice)
    strangers = evaluation.of_unknown()
    work = _Work(device, options, workers, notice, progress)
    (model, first, ranking), unknown = work.rank_both(files, evaluation, strangers, second_stage, kept)
    run = evaluation.run
    groups = report_groups(run.dataset, evaluation.mentions, run.trained_on())
    without_image_M = torch.tensor([mention.image is None for mention in evaluation.mentions])
    metrics = {
        "model": evaluation.model.name,
        "split": evaluation.split,
        "index": files.name,
        **_metrics(ranking, groups, without_image_M, model),
        "index_bytes_per_entity": model.index.num_bytes / len(model.index),
    }
    fixed = model.matcher.fixed_batches()
    ranked = evaluation.split, evaluation.mentions, evaluation.entity_ids
    protocol = EvaluationProtocol.of(evaluation.run, evaluation.model.name, *ranked, fixed)
    metrics["protocol"] = protocol.model_dump(mode="json")
    if fixed:
        metrics["fixed_batches"] = {"mentions": fixed.mentions, "entities": fixed.entities}
    if passes := len(model.matcher.surveyed()):
        metrics["first_pass_pairs"] = passes * len(evaluation.mentions) * len(model.index)
    if second_stage is not None:
        metrics["first_stage"] = _first_stage(evaluation, first, second_stage.candidates)
    if candidates is not None:
        metrics["candidates"] = _candidate_metrics(model, candidates, ranking, device, notice)
    storage = run.storage / evaluation_name(evaluation.split, evaluation.model.name, run.below)
    metrics |= _other_data(run) | calibrated(evaluation, ranking, unknown, files.name)
    with storage.atomic(RANKS) as temporary:
        write_ranks(temporary, ranking.first(written), evaluation, groups, protocol)
    if strangers is not None and unknown is not None:
        metrics["unknown"] = len(strangers.mentions)
        with storage.atomic(UNKNOWN) as temporary:
            write_unknown(temporary, unknown.first(written), strangers)
    storage.write_json(METRICS_FILE, metrics)
    return Evaluated(storage.folder, metrics)


def _other_data(run: Run) -> dict[str, Any]:
    manifest = run.dataset.manifest
    return {"data": {"name": manifest.name, "sha256": run.dataset.manifest_hash}} if run.of_other_data else {}


def _checked_options(
    evaluation: OpenedEvaluation, second_stage: SecondStage | None, options: RankOptions, candidates: int | None
) -> RankOptions:
    """Options that keep as many entities as the second stage scores; errors as of `evaluate_model`."""
    if candidates is not None and candidates < 1:
        raise UserError(f"candidates: {candidates} are none to rank among; give at least 1")
    if evaluation.model.reranker is not None and second_stage is None:
        raise ValueError(
            f"{evaluation.model.name} re-ranks: its second stage is needed, or its figures are of the first"
        )
    if second_stage is not None:
        if candidates is not None:
            raise UserError(
                f"candidates: {evaluation.model.name} re-ranks {second_stage.candidates} of its first stage's best "
                f"already; ask for the first stage's, --model {evaluation.model.ranked_by}"
            )
        options = replace(options, top_k=max(options.top_k, second_stage.candidates))
    return options


@dataclass(frozen=True)
class _Work:
    """How an evaluation builds and ranks: here, or by workers."""

    device: torch.device
    options: RankOptions
    workers: RankingWorkers | None
    notice: Callable[[str], None]
    progress: Progress

    def rank_both(
        self,
        files: RankingFiles,
        evaluation: OpenedEvaluation,
        strangers: OpenedEvaluation | None,
        second_stage: SecondStage | None,
        kept: KeptScores | None,
    ) -> tuple[tuple[RankedModel, Ranking, Ranking], Ranking | None]:
        """What `rank` says of the split's mentions, and the ranking of those that have no gold in the kb."""
        self.build(files, evaluation)
        if strangers is not None:
            self.build(files.of(strangers), strangers)
            strangers.release_encoders()
        files.finish()
        evaluation.release_encoders()
        known = self.rank(files, evaluation, second_stage, kept)
        if strangers is None:
            return known, None
        return known, self.rank(files.of(strangers), strangers, second_stage and second_stage.over(strangers))[-1]

    def build(self, files: RankingFiles, evaluation: OpenedEvaluation) -> None:
        if self.workers:
            self.workers.build(files)
        else:
            files.build(list(files.missing), self.device, self.progress, evaluation)

    def rank(
        self,
        files: RankingFiles,
        evaluation: OpenedEvaluation,
        second_stage: SecondStage | None,
        kept: KeptScores | None = None,
    ) -> tuple[RankedModel, Ranking, Ranking]:
        """The model with its index and mentions, the first stage's ranking and the whole's."""
        model = files.open(evaluation)
        try:
            model, added = self._informed(model, files, kept)
            if self.workers:
                first = self.workers.rank(files, added)
            else:
                first = model.rank(self.device, self.options, self.notice, self.progress)
            model = replace(model, expert_scores={})  # they are large, and needed no more
            return model, first, first if second_stage is None else second_stage(first)
        except NotRankable as error:
            raise _unrankable(error, evaluation, model) from None

    def _informed(self, model: RankedModel, files: RankingFiles, kept: KeptScores | None) -> tuple[RankedModel, Table]:
        """The model as it can be ranked with, and what its mentions have come to know for it."""
        if not needs_survey(model):
            return model, NO_COLUMNS
        before, started = model.mentions.columns, time.monotonic()
        if self.workers:
            model = informed(model, self.workers.survey(files))
        else:
            model = surveyed(model, self.device, self.options, self.notice, kept=kept)
        experts, seconds = ", ".join(model.matcher.surveyed()), time.monotonic() - started
        self.notice(f"first of two passes: what {experts} say, {seconds:.1f} s")
        return model, Table({name: column for name, column in model.mentions.columns.items() if name not in before})


def _unrankable(error: NotRankable, evaluation: OpenedEvaluation, model: RankedModel) -> UserError:
    """The error in a user's words: it names the mention, the entity and what of the model scored them."""
    part = error.part or model.broken_part(error.mention, error.entity_row)
    of_part = f" ({part})" if part else ""
    return UserError(
        f"{evaluation.model.name} of {evaluation.run.storage} scores mention "
        f"{evaluation.mentions[error.mention].mention_id} and entity {evaluation.entity_ids[error.entity_row]} as NaN "
        f"or infinite{of_part}; its training diverged, or their features are broken"
    )


def _metrics(
    ranking: Ranking, groups: Sequence[Mapping[str, str]], without_image_M: Tensor, model: RankedModel
) -> dict[str, Any]:
    """What metrics.json holds; `confidence`: 95 % bootstrap interval of each figure, the same at every run."""
    experts, num_entities = model.choices, len(model.index)
    report: dict[str, Any] = {
        "overall": ranking.metrics(),
        "confidence": _confidence(ranking, [True] * len(groups)),
        "adjusted": adjusted(ranking.metrics(), num_entities),
        "mentions": len(groups),
        "entities": num_entities,
        "groups": {},
    }
    for name in sorted({name for each in groups for name in each}):
        report["groups"][name] = {
            value: {
                "mentions": sum(rows),
                **ranking.metrics(torch.tensor(rows)),
                "confidence": _confidence(ranking, rows),
            }
            for value, rows in rows_by_value(groups, name).items()
        }
    if ranking.cost.refinement is not None:
        report["refinement"] = asdict(ranking.cost.refinement)
    if ranking.cost.token_pairs_M2 is not None:
        computed, of_all_parts = ranking.cost.token_pairs_M2.sum(dim=0).tolist()
        report["token_pairs_skipped"] = 1 - computed / of_all_parts
    if ranking.choices is not None:
        report["experts"] = _expert_usage(ranking.choices, groups, experts)
        report["experts"]["best"] = _best_by_expert(ranking, ranking.choices, without_image_M, experts)
        if ranking.choices.tied_M is not None:
            report["experts"]["tie_share"] = float(ranking.choices.tied_M.sum()) / (len(groups) * num_entities)
    return report


def _confidence(ranking: Ranking, rows: Sequence[bool]) -> dict[str, tuple[float, float]]:
    rows_M = torch.tensor(rows)
    counts = ops.Counts(ranking.counts.better_M[rows_M], ranking.counts.tied_M[rows_M])
    return confidence(counts, torch.Generator().manual_seed(0))


def _candidate_metrics(
    model: RankedModel, k: int, ranking: Ranking, device: torch.device, notice: Callable[[str], None]
) -> dict[str, Any]:
    """How much of the exact ranking is left among `k` candidates. There is no mean rank: a gold may not be there."""
    num_entities = len(model.index)
    if k > num_entities:
        notice(f"{k} candidates of {num_entities} entities: all entities are candidates")
    search = CandidateSearch(GlobalVectors(model.matcher.to(device).eval(), device), model.index)
    links = link(model.matcher, model.mentions, model.index, search, k, top=k)
    ranks_M = ops.ranks_among(links.score_MT, links.row_MT, model.gold_row_M)
    return {
        "k": links.candidate_row_MK.shape[1],
        "search": search.method,
        recall_name(ranking.top_row_Mk.shape[1]): ops.recall_at(ranking.top_row_Mk, links.candidate_row_MK),
        "gold_recall": float(ranks_M.isfinite().double().mean()),
        **measure_among(ranks_M),
        "note": _CANDIDATES_NOTE,
    }


def _first_stage(evaluation: OpenedEvaluation, first: Ranking, candidates: int) -> dict[str, Any]:
    """The figures before re-ranking, and how many golds a second stage can find at all."""
    row_MK = first.top_row_Mk[:, :candidates]
    recall = (row_MK == evaluation.gold_row_M[:, None]).any(dim=1).double().mean()
    return {
        "model": evaluation.model.ranked_by,
        "candidates": row_MK.shape[1],
        "gold_recall": float(recall),
        **first.metrics(),
    }


def _expert_usage(choices: Choices, groups: Sequence[Mapping[str, str]], experts: Sequence[str]) -> dict[str, Any]:
    """Shares of all pairs and of gold pairs that went to each expert, overall and by kind."""

    def shares(rows: Tensor) -> dict[str, dict[str, float]]:
        pairs_B = choices.pairs_MB[rows].sum(dim=0).double()
        gold_B = torch.bincount(choices.gold_M[rows], minlength=len(experts)).double()
        return {
            "pair_share": dict(zip(experts, (pairs_B / pairs_B.sum()).tolist(), strict=True)),
            "gold_share": dict(zip(experts, (gold_B / gold_B.sum()).tolist(), strict=True)),
        }

    by_kind = {kind: shares(torch.tensor(rows)) for kind, rows in rows_by_value(groups, KIND).items() if kind}
    return {**shares(torch.ones(len(groups), dtype=torch.bool)), "by_kind": by_kind}


def _best_by_expert(
    ranking: Ranking, choices: Choices, without_image_M: Tensor, experts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Of the mentions whose best entity an expert scored: how many, how many without a picture, and their hits@1."""
    if not choices.top_Mk.shape[1]:
        return {}
    report: dict[str, dict[str, float]] = {}
    for number, name in enumerate(experts):
        rows_M = choices.top_Mk[:, 0] == number
        mentions, without_image = int(rows_M.sum()), int((rows_M & without_image_M).sum())
        report[name] = {"mentions": mentions, "without_image": without_image}
        if mentions:
            report[name]["hits@1"] = ranking.metrics(rows_M)["hits@1"]
    return report
