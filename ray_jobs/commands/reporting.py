"""The command `dsmip report`. Torch is imported inside: help and errors are quick."""

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.commands.options import MovedDataOption, RunArgument


def report(
    run: RunArgument,
    html: Annotated[Path, typer.Option("--html", help="The page's file.")],
    run2: Annotated[str | None, typer.Argument(help="Another run on the same mentions.", metavar="[RUN2]")] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    model: Annotated[str | None, typer.Option("--model", help="A part, or the system's name (default).")] = None,
    model2: Annotated[str | None, typer.Option("--model2", help="The same of RUN2.")] = None,
    across: Annotated[bool, typer.Option("--across", help="Also two that were not evaluated alike.")] = False,
    mentions: Annotated[
        int, typer.Option("--mentions", min=1, help="At most so many to look at; else a sample.")
    ] = 1000,
    data: MovedDataOption = None,
) -> None:
    """Makes one page of a run, or of two: figures, curves, mentions to look at, from what 'dsmip evaluate' wrote."""
    from dsmip.errors import UserError
    from dsmip.reporting.page import ReportOptions, write_report
    from ray_jobs.terminal.display import Display
    from ray_jobs.terminal.lines import say

    if model2 is not None and run2 is None:
        raise UserError("--model2: of which run? give RUN2")
    options = ReportOptions(split, (model, model2), across, mentions)
    with Display(transient=True) as display:
        shown = write_report(html, run, run2, options=options, data=data, progress=display)
    say(f"page: {html} ({shown.mentions} of {shown.of} mentions, {html.stat().st_size / 2**20:.1f} MiB)")
