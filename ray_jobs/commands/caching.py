"""The commands `dsmip cache`. Torch is imported inside: help and errors are quick."""

from typing import Annotated

import typer

from ray_jobs.commands.options import JsonOption

cache = typer.Typer(
    help="Shows and removes the feature tables of frozen encoders, which all runs share.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
PlaceArgument = Annotated[
    str | None,
    typer.Argument(
        help="Dataset that tables lie beside, or their own folder or URI (default: DSMIP_FEATURES, else this node's).",
        metavar="[DATA|PLACE]",
    ),
]


@cache.command("list")
def list_tables(place: PlaceArgument = None, json_file: JsonOption = None) -> None:
    """Shows the tables: what they are of, their size, when they were last used and whether they are in use."""
    from ray_jobs.local_jobs.caches import show_tables

    show_tables(place, json_file)


@cache.command()
def prune(
    place: PlaceArgument = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", min=0, help="Gigabytes to keep (default: DSMIP_FEATURES_GB, else all that fits)."),
    ] = None,
    unused: Annotated[
        float | None, typer.Option("--unused", min=0, help="Remove what was not used for so many days.")
    ] = None,
) -> None:
    """Removes tables that were not used for the longest, none that is in use, and what killed writers have left."""
    from ray_jobs.local_jobs.caches import prune_tables

    prune_tables(place, keep, unused)
