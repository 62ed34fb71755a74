"""The job `dsmip evaluate`: exact ranking of one model on one split, in this process, without Ray."""

from pathlib import Path
from typing import Any

import torch

from dsmip.errors import UserError
from dsmip.reports import default_model, evaluate_model
from dsmip.runs import Run

SHOWN = ("hits@1", "hits@3", "hits@5", "mrr", "mean_rank")


def evaluate_run(folder: Path, split: str, model: str | None, device: str) -> dict[str, Any]:
    """Evaluates a finished part or the whole system of a run, prints the main figures and returns the metrics.

    Raises UserError for an unknown model, split or device, or a model that is not trained yet.
    """
    run = Run.open(folder)
    evaluated = evaluate_model(run, split, model or default_model(run), checked_device(device))
    metrics = evaluated.metrics
    figures = "  ".join(f"{name} {metrics['overall'][name]:.3f}" for name in SHOWN)
    print(f"{metrics['model']} on {split}: {metrics['mentions']} mentions, {metrics['entities']} entities")
    print(f"  {figures}")
    print(f"  {evaluated.folder / 'metrics.json'}")
    return metrics


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
