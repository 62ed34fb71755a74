"""Commands of published systems. Torch is imported inside the functions: help and errors are quick."""

from pathlib import Path
from typing import Annotated

import typer

from dsmip.errors import UserError
from ray_jobs.commands.options import DataOption, JsonOption, RunOption, SetOption


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


def import_checkpoint(
    system: Annotated[str, typer.Argument(help="mimic, m3el or mmoe.", metavar="SYSTEM")],
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint (.ckpt of PyTorch Lightning).")],
    data: DataOption,
    run: RunOption,
    config: Annotated[
        str | None,
        typer.Option("--config", help="What it was trained with (default: the published settings for WikiMEL)."),
    ] = None,
    set: SetOption = None,
) -> None:
    """Makes a run of a released checkpoint, for 'dsmip evaluate'. Its tensors are read; nothing in it is executed."""
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs.import_run import import_run

    import_run(system, path_here(checkpoint), run, data, config=config, overrides=set or [])
