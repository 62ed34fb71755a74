"""The commands `dsmip entities`. Torch is imported inside: help and errors are quick."""

from pathlib import Path
from typing import Annotated

import typer

entities = typer.Typer(
    help="Changes the entities of a bundle of 'dsmip export'; its model stays.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
BundleArgument = Annotated[str, typer.Argument(help="Folder of the bundle.", metavar="BUNDLE")]
FileArgument = Annotated[
    Path,
    typer.Argument(
        help="File of entities, .jsonl: entity_id, name, attributes, images (paths from its folder).", metavar="FILE"
    ),
]
IdsArgument = Annotated[
    Path, typer.Argument(help="File of entities, .jsonl; their entity_id alone counts.", metavar="FILE")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where entities are encoded: cpu, cuda, cuda:1 ...")]


@entities.command()
def add(bundle: BundleArgument, file: FileArgument, device: DeviceOption = "cpu") -> None:
    """Adds entities that are not there yet: all or none."""
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs.linking.entities import change_entities

    change_entities(bundle, "add", path_here(file), device)


@entities.command()
def update(bundle: BundleArgument, file: FileArgument, device: DeviceOption = "cpu") -> None:
    """Replaces entities by others with their ids: all or none."""
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs.linking.entities import change_entities

    change_entities(bundle, "update", path_here(file), device)


@entities.command()
def remove(bundle: BundleArgument, file: IdsArgument) -> None:
    """Removes entities: all or none."""
    from dsmip.storage.locations import path_here
    from ray_jobs.local_jobs.linking.entities import change_entities

    change_entities(bundle, "remove", path_here(file))


@entities.command()
def compact(bundle: BundleArgument) -> None:
    """Joins what many changes have left; links stay the same."""
    from ray_jobs.local_jobs.linking.entities import compact_entities

    compact_entities(bundle)
