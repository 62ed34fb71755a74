"""The job `dsmip evaluate`: exact ranking of one model on one split, in this process without Ray, or on Ray workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsmip.errors import UserError
from dsmip.evaluation import Ranking
from dsmip.rank_options import RankOptions
from dsmip.ranked_model import RankedFiles, model_names
from dsmip.reports import evaluate_model
from dsmip.runs import Run
from ray_jobs.lines import ProgressLines

SHOWN = ("hits@1", "hits@3", "hits@5", "mrr", "mean_rank")
_SHOWN_OF_CANDIDATES = ("hits@1", "hits@5", "hits@20", "mrr")


def evaluate_run(
    folder: Path,
    split: str,
    model: str | None,
    device: str,
    *,
    workers: int = 1,
    options: RankOptions = RankOptions(),
    candidates: int | None = None,
) -> dict[str, Any]:
    """Evaluates a finished part or the whole system of a run, prints the main figures and returns the metrics.

    workers: more than one rank slices of the kb on Ray. candidates: how many to rank among as well, apart from the
    metrics and in this process. Raises UserError for an unknown model, split or device, or a model that is not trained
    yet; JobFailed when a worker fails.
    """
    run, place = Run.open(folder), checked_device(device)
    workers = min(workers, run.dataset.num_entities)
    if workers > 1 and place.index is not None:
        raise UserError(f"--device {device} with {workers} workers: Ray gives each worker its device; say {place.type}")
    rank_stored = None if workers == 1 else _ranker_on_ray(workers, place, options)
    model = model or model_names(run.config)[0]
    evaluated = evaluate_model(
        run,
        split,
        model,
        place,
        options=options,
        rank_stored=rank_stored,
        progress=ProgressLines(),
        candidates=candidates,
    )
    metrics = evaluated.metrics
    figures = "  ".join(f"{name} {metrics['overall'][name]:.3f}" for name in SHOWN)
    refined = metrics["refinement"]
    print(f"{metrics['model']} on {split}: {metrics['mentions']} mentions, {metrics['entities']} entities")
    print(f"  {figures}")
    print(
        f"  exact: {refined['num_pairs']} pairs within {refined['band']:.1e} of a decision scored again in float64;"
        f" index: {metrics['index_bytes_per_entity']:.0f} bytes an entity"
    )
    if "token_pairs_skipped" in metrics:
        print(f"  {metrics['token_pairs_skipped']:.0%} of the experts' token-level scores were not needed")
    if "prune" in metrics:
        method, rate = metrics["prune"]["method"], metrics["prune"]["survivor_rate"]
        print(f"  pruned by {method}: token-level scores were computed for {rate:.1%} of the pairs that have them")
    elif options.prune != "none":
        print(f"  nothing to prune: {model} has no token-level scores")
    if "candidates" in metrics:
        _print_candidates(metrics["candidates"])
    print(f"  {evaluated.folder / 'metrics.json'}")
    return metrics


def _print_candidates(found: dict[str, Any]) -> None:
    recall = next(name for name in found if name.startswith("recall@"))
    figures = "  ".join(f"{name} {found[name]:.3f}" for name in _SHOWN_OF_CANDIDATES)
    print(
        f"  candidates, not the full ranking: {found['k']} by global vectors ({found['search']}) hold"
        f" {found[recall]:.1%} of the exact top {recall.split('@')[1]} and {found['gold_recall']:.1%} of the golds"
    )
    print(f"  among candidates only, never to be reported as metrics: {figures}")


def _ranker_on_ray(workers: int, device: torch.device, options: RankOptions) -> Callable[[RankedFiles], Ranking]:
    def rank_stored(stored: RankedFiles) -> Ranking:
        from ray_jobs.progress import Display
        from ray_jobs.rank_slices import rank_on_ray  # imports Ray, which one worker does without

        return rank_on_ray(stored, workers, gpu=device.type == "cuda", options=options, display=Display())

    return rank_stored


def checked_device(name: str) -> torch.device:
    """The device of that name; UserError when there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


if __name__ == "__main__":
    from ray_jobs.cli import run_script

    run_script("evaluate")
