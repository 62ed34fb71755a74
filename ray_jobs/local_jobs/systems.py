"""The job `dsmip systems`: the registered systems, their parts, inputs and parameters. Nothing is built in memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from dsmip.config import ExperimentConfig
from dsmip.encoders.architecture import resolve_architecture
from dsmip.errors import UserError
from dsmip.models import find_system, systems
from dsmip.models.base import System
from dsmip.runs.load_config import changed, job_config, load_config
from dsmip.storage.atomic import write_masked_json
from ray_jobs.terminal.lines import result_console


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that a part reads.

    Attributes:
        mention, entity: Their templates; empty where a side's texts are not read.
        tokens: How many of a text it reads.
        padded: Whether every text is brought to that length.
    """

    mention: str
    entity: str
    tokens: int
    padded: bool


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that a part reads: squares of `size` pixels, resized by `resize` (crop, squash) with `filter`."""

    size: int
    resize: str
    filter: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a system; the last one of a gated system is the whole, on the other parts' features.

    Attributes:
        stage: In which it is trained.
        texts, pictures: None: it reads none itself.
        trained: How many parameters are trained.
        total: How many it has, towers included.
    """

    name: str
    stage: int
    texts: Texts | None
    pictures: Pictures | None
    trained: int
    total: int


@dataclass(frozen=True, slots=True)
class Description:
    """A system under a configuration.

    Attributes:
        unknown: Why its parts are not known: its backbone's description cannot be had.
    """

    system: str
    paper: str
    config: str
    backbone: str
    parts: tuple[Part, ...]
    unknown: str | None = None


def describe(config: ExperimentConfig, name: str) -> Description:
    """The parts of a configuration's system, built on the device meta: no weights are read.

    Args:
        config: The configuration.
        name: What it is called.

    Raises:
        UserError: The backbone is unknown, or cannot hold what the system asks of it.
    """
    system = find_system(config.model)
    bare = changed(config, {"backbone": {"pretrained": None}})
    with torch.device("meta"):
        parts = [_part(system, part, bare) for part in system.part_names(config.system)]
        if system.gated:
            parts.append(Part(system.name, 2, None, None, *_counts(system.build_whole(bare))))
    return Description(system.name, system.paper, name, config.backbone.architecture, tuple(parts))


def show_systems(config: str | None, overrides: Sequence[str], json_file: Path | None) -> list[Description]:
    """Prints the systems, each under its published configuration of WikiMEL, or the one of a configuration.

    Args:
        config: A shipped configuration's name or a YAML file; None: all systems.
        overrides: `key=value` of it.
        json_file: Where to write all of it as well.

    Raises:
        UserError: A wrong configuration.
    """
    if config is None:
        names = [system.published_config for _, system in sorted(systems().items())]
        found = [_described_if_possible(load_config(name, overrides), name) for name in names]
    else:
        found = [describe(job_config(config, overrides), config)]
    table = Table("system", "configuration", "part", "texts", "pictures", "trained", "of", header_style="bold")
    for each in found:
        table.add_section()
        if each.unknown:
            table.add_row(each.system, each.config, "?", "", "", "?", "?")
        for number, part in enumerate(each.parts):
            about = (each.system, each.config) if number == 0 else ("", "")
            part_name = f"{part.name} (stage two)" if part.stage == 2 else part.name
            table.add_row(*about, part_name, *_reads(part), _millions(part.trained), _millions(part.total))
    console = result_console()
    console.print(table)
    for each in found:
        unknown = f"; not counted: {each.unknown}" if each.unknown else ""
        console.print(f"  {each.system}: {each.paper}; backbone {each.backbone}{unknown}", soft_wrap=True)
    if json_file is not None:
        write_masked_json(json_file, [asdict(each) for each in found])
    return found


def _described_if_possible(config: ExperimentConfig, name: str) -> Description:
    """As `describe`; a backbone that cannot be had keeps none of the others from being listed."""
    try:
        return describe(config, name)
    except UserError as error:
        system = find_system(config.model)
        return Description(system.name, system.paper, name, config.backbone.architecture, (), str(error))


def _part(system: type[System], name: str, config: ExperimentConfig) -> Part:
    form, network = system.item_format(config.system, name), resolve_architecture(config.backbone.architecture)
    texts, pictures = None, None
    if "text" in form.of_either:
        tokens = form.num_tokens or network.context_length - form.reserve
        padded = form.num_tokens is not None or network.reads_padding
        mention = form.template.mention if "text" in form.modalities else ""
        entity = form.template.entity if "text" in form.of_entities else ""
        texts = Texts(mention, entity, tokens, padded)
    if "image" in form.of_either:
        pixels = form.pixels or network.pixels
        pictures = Pictures(network.image_size, pixels.resize, pixels.filter)
    reranks = name in system.rerankers(config.system)
    module = system.build_reranker(name, config) if reranks else system.build_part(name, config, with_encoder=True)
    return Part(name, 1, texts, pictures, *_counts(module))


def _counts(module: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    parameters = list(module.parameters())
    return sum(each.numel() for each in parameters if each.requires_grad), sum(each.numel() for each in parameters)


def _reads(part: Part) -> tuple[str, str]:
    texts, pictures = part.texts, part.pictures
    return (
        f"{'' if texts.padded else 'up to '}{texts.tokens} tokens" if texts else "",
        f"{pictures.size} x {pictures.size}, {pictures.resize}, {pictures.filter}" if pictures else "",
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
