"""The job `dsmip evaluate`: exact ranking of one model on one split, in this process without Ray, or on Ray workers."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.table import Table

from dsmip.calibration.calibration import MIN_MENTIONS
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.metrics import METRICS, shown_metrics
from dsmip.evaluation.report import Evaluated, evaluate_model, recall_name
from dsmip.evaluation.stored.layout import CALIBRATED_ON, evaluation_name
from dsmip.rank_options import RankOptions, device_here, named_device
from dsmip.reranking.second_stage import second_stage
from dsmip.runs.run import Run
from dsmip.storage.locations import Location
from dsmip.units.text_unit import check_backend
from ray_jobs.jobs.ranking_workers import RayWorkers
from ray_jobs.local_jobs.beside import show_beside
from ray_jobs.local_jobs.status import open_run
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import result_console, say

if TYPE_CHECKING:
    pass

Result = TypeVar("Result")


def evaluate_run(
    location: Location,
    split: str,
    model: str | None,
    device: str,
    *,
    data: Location | None = None,
    workers: int = 1,
    options: RankOptions = RankOptions(),
    candidates: int | None = None,
    verbose: bool = False,
    any_data: bool = True,
) -> dict[str, Any]:
    """Evaluates a finished part or the whole system of a run, prints the main figures and returns the metrics.

    Args:
        data: Other data to rank; or where the run's own lies, if it has moved.
        workers: More than one build the index and rank slices of it on Ray, each on its own device; this process then
            needs no GPU.
        candidates: How many to rank among as well, apart from the metrics and in this process.
        verbose: Also prints what exact ranks took.
        any_data: Whether `data` may be other than the run's own.

    Raises:
        UserError: For an unknown model, split or device, a model that is not trained yet, or workers that the cluster
            can never give.
        JobFailed: When a worker fails.
    """
    named = named_device(device)
    check_backend(options.backend, options.precision, named)
    run = open_run(location, data, any_data=any_data)
    workers = min(workers, run.dataset.num_entities)
    with run.recorded("evaluate"):
        if workers > 1:
            evaluation = OpenedEvaluation(run, split, model)
            evaluated = _evaluate_on_ray(evaluation, named, workers, options, candidates)
        else:
            device_here(named)
            evaluation = OpenedEvaluation(run, split, model)
            with Display() as progress:
                evaluated = evaluate_model(
                    evaluation,
                    named,
                    second_stage=second_stage(evaluation, named, progress),
                    options=options,
                    notice=say,
                    progress=progress,
                    candidates=candidates,
                )
    _show(evaluated.metrics, options.top_k, verbose=verbose)
    if "experts" in evaluated.metrics:
        for line in missing_image_notes(evaluated.metrics["experts"]["best"], _image_alone(run)):
            say(line)
        show_beside(run, split, list(evaluated.metrics["experts"]["best"]))
    say(f"  {run.storage}/{evaluation_name(split, evaluated.metrics['model'], run.below)}/metrics.json")
    return evaluated.metrics


def calibrate_run(
    location: Location, model: str | None, device: str, *, data: Location | None = None, workers: int = 1
) -> None:
    """Evaluates a model on the validation split, which calibrates it, and prints what that gave.

    Raises:
        UserError: There are too few mentions, or as for `evaluate_run`.
        JobFailed: When a worker fails.
    """
    metrics = evaluate_run(location, CALIBRATED_ON, model, device, data=data, workers=workers, any_data=False)
    if "calibration" not in metrics:
        raise UserError(
            f"{location}: {metrics['mentions']} validation mentions are too few to calibrate {metrics['model']}: "
            f"{MIN_MENTIONS} at least"
        )
    say(f"{metrics['model']} is calibrated: evaluations say how good its confidences are")


def _show(metrics: Mapping[str, Any], top_k: int, *, verbose: bool) -> None:
    figures = "  ".join(f"{name} {metrics['overall'][name]:.3f}" for name in shown_metrics())
    say(f"{metrics['model']} on {metrics['split']}: {metrics['mentions']} mentions, {metrics['entities']} entities")
    say(f"  {figures}")
    if verbose:
        refined = metrics["refinement"]
        say(
            f"  exact: {refined['num_pairs']} pairs within {refined['band']:.1e} of a decision scored again in float64"
            f" ({refined['num_scored']} with those beside them);"
            f" index: {metrics['index_bytes_per_entity']:.0f} bytes an entity"
        )
        if "token_pairs_skipped" in metrics:
            say(f"  {metrics['token_pairs_skipped']:.0%} of the experts' token-level scores were not needed")
    if "first_stage" in metrics:
        _show_first_stage(metrics["first_stage"])
    if "experts" in metrics:
        _show_experts(metrics["experts"]["best"])
    if "calibration" in metrics:
        _show_confidence(metrics["calibration"])
    if "candidates" in metrics:
        _show_candidates(metrics["candidates"], min(top_k, metrics["entities"]))


def _show_confidence(found: Mapping[str, Any]) -> None:
    right, known = found["right"], found.get("known")
    on_these = " (of the mentions that it was fitted on)" if found["fitted_on_these"] else ""
    say(
        f"  confidence{on_these}: off by {right['expected_calibration_error']:.3f} on average; the surer half has"
        f" hits@1 {right['hits@1_of_the_surest_half']:.3f}"
    )
    if known is not None:
        real = f", {known['unknown_mentions']} here" if "unknown_mentions" in known else ""
        say(
            f"  not in the knowledge base: AUROC {known['auroc']:.3f}; finds {known['recall']:.0%} of such mentions"
            f" with {known['false_alarms']:.0%} false alarms, F1 {known['f1']:.3f} where {known['unknown_share']:.0%}"
            f" are such{real}"
        )


def _show_first_stage(first: Mapping[str, Any]) -> None:
    figures = "  ".join(f"{name} {first[name]:.3f}" for name in shown_metrics())
    name, recall = first["model"], first["gold_recall"]
    say(f"  re-ranked: the best {first['candidates']} of {name}, which hold {recall:.1%} of the golds")
    say(f"  {name} alone: {figures}")


def _show_candidates(found: Mapping[str, Any], exact_k: int) -> None:
    """Figures among candidates; the exact ranking has kept `exact_k` entities."""
    figures = "  ".join(f"{name} {found[name]:.3f}" for name, metric in METRICS.items() if metric.shown_of_candidates)
    say(
        f"  candidates, not the full ranking: {found['k']} by global vectors ({found['search']}) hold"
        f" {found[recall_name(exact_k)]:.1%} of the exact top {exact_k} and {found['gold_recall']:.1%} of the golds"
    )
    say(f"  among candidates only, never to be reported as metrics: {figures}")


def _show_experts(best: Mapping[str, Mapping[str, float]]) -> None:
    """Who scored the best entities, and how well."""
    table = Table("  best entity scored by", "mentions", "without a picture", "hits@1", box=None, pad_edge=False)
    for name, found in best.items():
        hits = f"{found['hits@1']:.3f}" if "hits@1" in found else ""
        table.add_row(f"  {name}", f"{found['mentions']:.0f}", f"{found['without_image']:.0f}", hits)
    result_console().print(table)


def missing_image_notes(best: Mapping[str, Mapping[str, float]], image_alone: Collection[str]) -> Iterator[str]:
    """Why an expert scored the best entity of mentions of which it knows nothing.

    Args:
        best: By expert, as in metrics.json.
        image_alone: Experts that look at pictures alone.
    """
    for name in image_alone:
        if name in best and (count := int(best[name]["without_image"])):
            yield (
                f"  {name} knows nothing of {count} of its mentions: they have no picture. Nothing forbids the gate to "
                "choose it (docs/evaluation.md); it learns not to where training mentions lack pictures too"
            )


def _image_alone(run: Run) -> list[str]:
    formats = {name: run.system.item_format(run.config.system, name) for name in run.part_names}
    return [name for name, form in formats.items() if form.modalities == ("image",)]


def _evaluate_on_ray(
    evaluation: OpenedEvaluation, device: torch.device, workers: int, options: RankOptions, candidates: int | None
) -> Evaluated:
    if device.index is not None:
        raise UserError(
            f"--device {device} with {workers} workers: Ray gives each worker its device; say {device.type}"
        )
    from ray_jobs.cluster.connection import connected  # these import Ray, which one worker does without
    from ray_jobs.cluster.resources import Request, check_before_start, check_feasible

    gpu = device.type == "cuda"
    request = Request("evaluate", workers, 1, int(gpu))
    check_before_start([request])
    _ = evaluation.gold_row_M  # a split without mentions is refused first
    here = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    rerank = second_stage(evaluation, here)
    if rerank is not None:
        options = replace(options, top_k=max(options.top_k, rerank.candidates))
    with connected():
        check_feasible([request])
        return evaluate_model(
            evaluation,
            here,
            second_stage=rerank,
            options=options,
            notice=say,
            candidates=candidates,
            workers=RayWorkers(workers, gpu, options, Display()),
        )
