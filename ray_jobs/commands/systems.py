"""Commands of published systems. Torch is imported inside the functions: help and errors are quick."""

from typing import Annotated

import typer

from dsmip.errors import UserError
from ray_jobs.commands.options import JsonOption, SetOption


def systems(
    config: Annotated[
        str | None,
        typer.Option("--config", help="A shipped configuration or a YAML file: its system alone (default: all)."),
    ] = None,
    set: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Lists the systems: parts, inputs, trained and all parameters, paper. No weights are read."""
    if set and config is None:
        raise UserError("--set changes a configuration: name one by --config")
    from ray_jobs.local_jobs.systems import show_systems

    show_systems(config, set or [], json_file)
