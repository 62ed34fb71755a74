"""The command `plan`. Torch is imported inside the function: help and errors are quick."""

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.commands.options import ConfigOption, DataOption, JsonOption, SetOption


def plan(
    config: ConfigOption,
    data: DataOption,
    run: Annotated[str, typer.Option("--run", help="Where the run will lie, for the free disk.")] = ".",
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", help="Plan for the nodes of this cluster file, from stated rates of its machines."),
    ] = None,
    entities: Annotated[
        int | None,
        typer.Option(min=2, help="Plan as if the knowledge base had so many entities like those of the data."),
    ] = None,
    set: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Says what a configuration will take on a data set; exit code 1 when something does not fit."""
    from ray_jobs.local_jobs.planning.plan import plan as make_plan

    if not make_plan(config, data, run, cluster, set or [], json_file, entities).fits:
        raise typer.Exit(1)
