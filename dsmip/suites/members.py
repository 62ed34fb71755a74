"""Members of a suite: a system on a data set with a share of its training mentions and a seed, and what all must share.

A member is one run. Its figures stand in rows, one for each model of it that is evaluated, and in a column, which is a
data set with a share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dsmip.config import ExperimentConfig, deep_merged
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import Manifest
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.load_config import job_config, parse_config
from dsmip.runs.loaded_model import evaluated_names, model_names
from dsmip.suites.schema import Suite, SuiteSystem


@dataclass(frozen=True, slots=True)
class Column:
    """A data set, with a share of its training mentions."""

    data: str
    share: float

    def __str__(self) -> str:
        return self.data if self.share == 1 else f"{self.data}, {percent(self.share)}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the tables.

    Attributes:
        name: By which published figures and tests name it.
        label: In tables.
        system: Of the suite.
        model: That is evaluated in the system's runs.
    """

    name: str
    label: str
    system: str
    model: str


@dataclass(frozen=True, slots=True)
class Member:
    """A run of a suite.

    Attributes:
        folder: Its data set's, of the data root.
        config: All of it; its seed is the member's.
        models: That are evaluated.
    """

    system: str
    column: Column
    seed: int
    folder: str
    config: ExperimentConfig
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique, and a path."""
        share = "" if self.column.share == 1 else f"-{percent(self.column.share).replace(' %', '')}"
        return f"{self.column.data}{share}/{self.system}/seed-{self.seed}"


def percent(share: float) -> str:
    """A share in words.

    >>> percent(0.1), percent(0.125)
    ('10 %', '12.5 %')
    """
    return f"{100 * share:g} %"


def backbone_file(out: Path, data: str) -> Path:
    """Where the backbone is that is trained on a data set's knowledge base."""
    return out / "backbones" / f"{data}.safetensors"


def suite_rows(suite: Suite, members: Sequence[Member]) -> list[Row]:
    """The rows, in the suite's order.

    Raises:
        UserError: The row that is tested is none of them.
    """
    found: dict[str, Row] = {}
    for member in members:
        system = suite.all_systems()[member.system]
        whole = model_names(member.config)[0]
        for model in member.models:
            name = member.system if model == whole else f"{member.system}/{model}"
            label = system.rows.get(model) or system.label or member.system
            found.setdefault(name, Row(name, label, member.system, model))
    if suite.significance is not None and suite.significance.of not in found:
        raise UserError(f"significance.of: unknown row '{suite.significance.of}'; there are {', '.join(found)}")
    return list(found.values())


def suite_members(suite: Suite, source: str, out: Path) -> list[Member]:
    """All members, by data set, share, system and seed.

    Args:
        suite: The suite.
        source: Begins messages.
        out: Where what the suite makes lies.

    Raises:
        UserError: A configuration is unknown or wrong, a model is none of its system's, or no system has a gate where a
            space is to be searched.
    """
    members = []
    for (data, about), share, (name, system) in product(suite.data.items(), suite.shares, suite.all_systems().items()):
        where = f"{source}: systems.{name}"
        backbone = backbone_file(out, data) if about.backbone else None
        config = _member_config(suite, system, data, backbone, where)
        models = tuple(system.rows) or model_names(config)[:1]
        for model in models:
            if model not in (known := evaluated_names(config)):
                raise UserError(f"{where}.rows: unknown model '{model}'; it has {', '.join(known)}")
        members += [
            Member(name, Column(data, share), seed, system.data.get(data, data), _seeded(config, seed), models)
            for seed in suite.seeds
        ]
    if suite.search is not None and not any(find_system(member.config.model).gated for member in members):
        raise UserError(f"{source}: search: no system has a gate, so there is nothing that stage two could search")
    return members


def check_protocols(members: Sequence[Member], datasets: Mapping[str, Dataset]) -> list[str]:
    """What differs in the data of members that stand in one table, in words; it must be nothing for a comparison.

    Args:
        members: Of the suite.
        datasets: By folder, those that are there.
    """
    found = []
    for data in dict.fromkeys(member.column.data for member in members):
        folders = dict.fromkeys(member.folder for member in members if member.column.data == data)
        first, *others = [folder for folder in folders if folder in datasets] or [""]
        for other in others:
            if differences := data_differences(datasets[first].manifest, datasets[other].manifest):
                found.append(f"{data}: {first} and {other} are not alike: {'; '.join(differences)}")
    return found


def data_differences(first: Manifest, second: Manifest) -> list[str]:
    """What keeps figures on two data sets from being compared, in words."""
    own, others = _compared(first), _compared(second)
    names = [name for name in sorted(own.keys() | others.keys()) if own.get(name) != others.get(name)]
    return [f"{name} ({_shown(own.get(name))} and {_shown(others.get(name))})" for name in names]


def _compared(manifest: Manifest) -> dict[str, Any]:
    shards = [shard.sha256 for shard in manifest.shards_of("test")]
    return {
        "entities": manifest.entities,
        "knowledge base": manifest.entities_sha256,
        "test mentions": manifest.splits["test"].mentions,
        "files of the test mentions": shards[0] if len(shards) == 1 else str(shards),
        **manifest.choices,
    }


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)[:16]


def _member_config(
    suite: Suite, system: SuiteSystem, data: str, backbone: Path | None, source: str
) -> ExperimentConfig:
    name = system.config.replace("{data}", data)
    try:
        tree = job_config(name).model_dump(mode="json")
    except UserError as error:
        raise UserError(f"{source}.config: {error}") from error
    tree = deep_merged(tree, system.set)
    if backbone is not None:
        tree = deep_merged(tree, {"backbone": {"pretrained": str(backbone)}})
    config = parse_config(tree, f"{source}, {name}")
    if not find_system(config.model).gated:
        return config
    if suite.search is None:
        tuned = {"trials": 1, "rungs": [config.tune_train().epochs], "space": {}}
    else:
        tuned = suite.spaces[suite.search].model_dump(mode="json")
    whole = config.model_dump(mode="json")
    return parse_config({**whole, "tune": {**whole["tune"], **tuned}}, f"{source}, spaces.{suite.search}")


def _seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    return config.model_copy(update={"seed": seed})
