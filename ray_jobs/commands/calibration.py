"""The command `dsmip calibrate`. Torch is imported inside: help and errors are quick."""

from typing import Annotated

import typer

from ray_jobs.commands.options import MovedDataOption, RunOption


def calibrate(
    run: RunOption,
    model: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[int, typer.Option("--workers", min=1, help="As for 'dsmip evaluate'.")] = 1,
    data: MovedDataOption = None,
) -> None:
    """Learns from the validation mentions how sure a model is: confidences, and "not in the knowledge base"."""
    from ray_jobs.jobs.evaluate import calibrate_run

    calibrate_run(run, model, device, data=data, workers=workers)
