"""The job `dsmip evaluate`: exact ranking of one model on one split, in this process without Ray, or on Ray workers."""

from functools import partial
from typing import Any

import torch

from dsmip.config import RankOptions
from dsmip.errors import UserError
from dsmip.evaluation.ranked_model import model_names
from dsmip.evaluation.report import Evaluated, evaluate_model, evaluation_name
from dsmip.runs.run import Run
from dsmip.storage.locations import Location
from ray_jobs.terminal.display import Display

SHOWN = ("hits@1", "hits@3", "hits@5", "mrr", "mean_rank")
_SHOWN_OF_CANDIDATES = ("hits@1", "hits@5", "hits@20", "mrr")


def evaluate_run(
    location: Location,
    split: str,
    model: str | None,
    device: str,
    *,
    workers: int = 1,
    options: RankOptions = RankOptions(),
    candidates: int | None = None,
) -> dict[str, Any]:
    """Evaluates a finished part or the whole system of a run, prints the main figures and returns the metrics.

    workers: more than one build the index and rank slices of it on Ray, each on its own device; this process then needs
    no GPU. candidates: how many to rank among as well, apart from the metrics and in this process.
    Raises UserError for an unknown model, split or device, a model that is not trained yet, or workers that the cluster
    can never give; JobFailed when a worker fails.
    """
    run, place = Run.open(location), named_device(device)
    model, workers = model or model_names(run.config)[0], min(workers, run.dataset.num_entities)
    with run.recorded("evaluate"):
        if workers > 1:
            evaluated = _evaluate_on_ray(run, split, model, place, workers, options, candidates)
        else:
            check_here(place)
            with Display() as progress:
                evaluated = evaluate_model(
                    run, split, model, place, options=options, progress=progress, candidates=candidates
                )
    metrics = evaluated.metrics
    figures = "  ".join(f"{name} {metrics['overall'][name]:.3f}" for name in SHOWN)
    refined = metrics["refinement"]
    print(f"{metrics['model']} on {split}: {metrics['mentions']} mentions, {metrics['entities']} entities")
    print(f"  {figures}")
    print(
        f"  exact: {refined['num_pairs']} pairs within {refined['band']:.1e} of a decision scored again in float64"
        f" ({refined['num_scored']} with those beside them);"
        f" index: {metrics['index_bytes_per_entity']:.0f} bytes an entity"
    )
    if "token_pairs_skipped" in metrics:
        print(f"  {metrics['token_pairs_skipped']:.0%} of the experts' token-level scores were not needed")
    if "candidates" in metrics:
        _print_candidates(metrics["candidates"])
    print(f"  {run.storage}/{evaluation_name(split, model)}/metrics.json")
    return metrics


def _print_candidates(found: dict[str, Any]) -> None:
    recall = next(name for name in found if name.startswith("recall@"))
    figures = "  ".join(f"{name} {found[name]:.3f}" for name in _SHOWN_OF_CANDIDATES)
    print(
        f"  candidates, not the full ranking: {found['k']} by global vectors ({found['search']}) hold"
        f" {found[recall]:.1%} of the exact top {recall.split('@')[1]} and {found['gold_recall']:.1%} of the golds"
    )
    print(f"  among candidates only, never to be reported as metrics: {figures}")


def _evaluate_on_ray(
    run: Run, split: str, model: str, device: torch.device, workers: int, options: RankOptions, candidates: int | None
) -> Evaluated:
    if device.index is not None:
        raise UserError(
            f"--device {device} with {workers} workers: Ray gives each worker its device; say {device.type}"
        )
    from ray_jobs.cluster.connection import connected
    from ray_jobs.cluster.resources import Request, check_feasible
    from ray_jobs.jobs.build_pieces import build_on_ray  # these import Ray, which one worker does without
    from ray_jobs.jobs.rank_slices import rank_on_ray

    gpu, display = device.type == "cuda", Display()
    with connected():
        check_feasible([Request("evaluate", workers, 1, int(gpu))])
        return evaluate_model(
            run,
            split,
            model,
            torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"),
            options=options,
            make_pieces=partial(build_on_ray, workers=workers, gpu=gpu, display=display),
            rank_stored=partial(rank_on_ray, workers=workers, gpu=gpu, options=options, display=display),
            candidates=candidates,
        )


def named_device(name: str) -> torch.device:
    """The device of that name, wherever it is; UserError when there is no such name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or cuda:<number>")
    return device


def check_here(device: torch.device) -> None:
    """Raises UserError when this machine does not have the device."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs")
