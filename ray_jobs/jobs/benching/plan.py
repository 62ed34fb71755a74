"""The plan of a suite: members, rows and steps, checked against the data and what is there before anything runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.demo.release import DemoConfig
from dsmip.config import ExperimentConfig, validated
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import parse_view
from dsmip.errors import UserError
from dsmip.evaluation.stored.layout import METRICS_FILE, evaluation_name
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.runs.load_config import load_config, to_yaml
from dsmip.runs.loaded_model import CONFIG
from dsmip.runs.run import data_of_run, first_difference
from dsmip.storage.atomic import write_json, write_text
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.storage.locations import open_run_storage
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import STAMP
from dsmip.suites.members import Member, Row, backbone_file, check_protocols, suite_members, suite_rows
from dsmip.suites.schema import Suite
from dsmip.suites.steps import SPLIT, Places, Step, steps_of, suite_steps, wanted
from ray_jobs.jobs.pretrain import weights_stamp

_JOURNAL = "bench.json"


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        name: The suite's, as it was asked for.
        steps: All of the suite.
        chosen: Those that are run, as `--only` says.
        warnings: What differs in the data of members that stand in one table.
    """

    name: str
    suite: Suite
    places: Places
    members: Sequence[Member]
    rows: Sequence[Row]
    steps: Mapping[str, Step]
    chosen: Mapping[str, Step]
    warnings: Sequence[str]

    def prepare(self) -> None:
        """Writes what the steps read: configurations and worlds."""
        self.places.out.mkdir(parents=True, exist_ok=True)
        write_json(self.places.out / _JOURNAL, {"suite": self.name, "title": self.suite.title})
        for data, about in self.suite.data.items():
            if about.drawn is not None:
                write_text(self.places.world(data), yaml.safe_dump(about.drawn))
        for member in self.members:
            write_text(self.places.config(member), to_yaml(member.config))


def make_plan(name: str, suite: Suite, places: Places, only: Sequence[str], *, across: bool) -> Plan:
    """The plan of a suite.

    Args:
        name: As it was asked for.
        suite: The suite.
        places: Where it reads and writes.
        only: Systems and data sets; none: all.
        across: Also where the data of one table's members differ.

    Raises:
        UserError: A name is unknown, a data set is missing, members of one table were not or would not be evaluated
            alike, or the folder holds something else.
    """
    source = f"suite {name}"
    _check_folder(places.out, name)
    members = suite_members(suite, source, places.out)
    rows = suite_rows(suite, members)
    chosen = _chosen(suite, members, only)
    _check_worlds(suite, source, places)
    steps = suite_steps(suite, members, places)
    datasets = _datasets(suite, members, places)
    warnings = check_protocols(members, datasets)
    if warnings and not across:
        raise UserError(f"{source}: {warnings[0]}; take --across if that is what you compare")
    for member in members:
        _check_run(member, suite, places, datasets)
    _check_backbones(suite, members, places, datasets)
    if not across:
        _check_evaluations(members, places)
    own = [step for member in chosen for step in steps_of(steps, member)]
    return Plan(name, suite, places, members, rows, steps, wanted(steps, own), warnings)


def _check_folder(out: Path, name: str) -> None:
    path = out / _JOURNAL
    if path.is_file():
        stored = read_json(path, lambda it: str(it["suite"]), "; use another --out")
        if stored != name:
            raise UserError(f"--out {out} holds the suite {stored}; use another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty and holds no suite; use another --out")


def _chosen(suite: Suite, members: Sequence[Member], only: Sequence[str]) -> list[Member]:
    known = [*suite.data, *suite.all_systems()]
    for name in only:
        if name not in known:
            raise UserError(
                f"--only {name}: neither a data set nor a system of the suite; there are {', '.join(known)}"
            )
    data = [name for name in only if name in suite.data] or list(suite.data)
    systems = [name for name in only if name in suite.all_systems()] or list(suite.all_systems())
    return [member for member in members if member.column.data in data and member.system in systems]


def _check_worlds(suite: Suite, source: str, places: Places) -> None:
    """Checks what is to be drawn, and that what was drawn before is that."""
    for data, about in suite.data.items():
        if about.drawn is None:
            continue
        validated(DemoConfig, about.drawn, source, f"data.{data}.drawn.")
        world, drawn = places.world(data), places.base(suite, data, data) / MANIFEST_FILE
        if world.is_file() and drawn.is_file() and world.read_text(encoding="utf-8") != yaml.safe_dump(about.drawn):
            raise UserError(f"--out {places.out} holds {data} drawn by other settings ({world}); use another --out")


def _datasets(suite: Suite, members: Sequence[Member], places: Places) -> dict[str, Dataset]:
    """Data sets by folder, but for those that are still to be drawn."""
    bases = {member.folder: places.base(suite, member.column.data, member.folder) for member in members}
    drawn = {member.folder for member in members if suite.data[member.column.data].drawn is not None}
    needed = [folder for folder in bases if folder not in drawn]
    if needed and places.data_root is None:
        raise UserError(f"--data-root: name the folder of {', '.join(needed)}, made by 'dsmip prepare'")
    if missing := [folder for folder in needed if not (bases[folder] / MANIFEST_FILE).is_file()]:
        raise UserError(
            f"--data-root {places.data_root}: has no data set {', '.join(missing)}; make it: "
            f"dsmip prepare RELEASE {bases[missing[0]]}"
        )
    found = {folder: Dataset.open(base) for folder, base in bases.items() if (base / MANIFEST_FILE).is_file()}
    for dataset in found.values():
        if not dataset.num_mentions(SPLIT):
            raise UserError(f"{dataset.location}: has no mention of {SPLIT}, so there is nothing to measure")
    return found


def _check_run(member: Member, suite: Suite, places: Places, datasets: Mapping[str, Dataset]) -> None:
    """Checks that a run that is there is the member's."""
    run = places.run(member)
    if not (run / STAMP).is_file() or not (run / CONFIG).is_file():
        return
    stored = load_config(str(run / CONFIG))
    if difference := first_difference(_decisive(stored), _decisive(member.config)):
        raise UserError(f"{run} was made with other settings ({difference}); use another --out, or delete that folder")
    if member.folder not in datasets:
        return
    base, used = datasets[member.folder], places.data(suite, member)
    of_base = member.column.share == 1
    made_on = data_of_run(open_run_storage(str(run))).sha256
    if made_on != (base.manifest_hash if of_base else _view_hash(used / MANIFEST_FILE, base)):
        raise UserError(
            f"{run} was made on other data than {base.location if of_base else used} holds now; use another --out, or "
            "delete that folder"
        )


def _view_hash(manifest: Path, base: Dataset) -> str | None:
    """The hash of a view's manifest; None where it is not there, or no view of what the data set is now."""
    if not manifest.is_file():
        return None
    content = manifest.read_bytes()
    view = parse_view(content, str(manifest))
    return hashlib.sha256(content).hexdigest() if view and view.base_sha256 == base.manifest_hash else None


def _decisive(config: ExperimentConfig) -> dict[str, Any]:
    """What decides figures: not how trainings are run, nor a backbone's, which its own file tells."""
    tree = config.model_dump(mode="json", exclude={"watch", "pretrain"})
    tree["parts"] = {name: part.train for name, part in config.parts.items()}
    del tree["tune"]["resources"]
    return tree


def _check_backbones(suite: Suite, members: Sequence[Member], places: Places, datasets: Mapping[str, Dataset]) -> None:
    """Checks that backbones that are there were made by the suite's configurations, on its data."""
    for data, about in suite.data.items():
        if about.backbone is None:
            continue
        try:
            config = load_config(about.backbone)
        except UserError as error:
            raise UserError(f"data.{data}.backbone: {error}") from error
        weights = backbone_file(places.out, data)
        report = weights.with_name(f"{weights.name}.json")
        if not (weights.is_file() and report.is_file()) or data not in datasets:
            continue
        made = read_json(report, lambda it: str(it["sha256"]), f"; delete {weights} to make it anew")
        if made != weights_stamp(config, datasets[data].manifest_hash)["sha256"]:
            raise UserError(
                f"{weights} was made from other settings or data; use another --out, or delete that file and the runs "
                f"that began with it ({places.out / 'runs' / data}*)"
            )


def _check_evaluations(members: Sequence[Member], places: Places) -> None:
    """Checks that evaluations that are there, of one table, were made alike."""
    seen: dict[str, list[tuple[Path, EvaluationProtocol]]] = {}
    for member in members:
        for model in member.models:
            path = places.run(member) / evaluation_name(SPLIT, model) / METRICS_FILE
            if not path.is_file():
                continue
            protocol = read_json(path, _protocol, "; delete it to evaluate anew")
            if protocol is None:
                continue
            others = seen.setdefault(member.column.data, [])
            for other, its in others:
                if differences := its.differences(protocol):
                    raise UserError(
                        f"{other} and {path} were not evaluated alike: {'; '.join(differences)}; delete the one that "
                        "is not to be compared, or take --across"
                    )
            if all(protocol != its for _, its in others):  # one that says less may be like two that are not alike
                others.append((path, protocol))


def _protocol(metrics: Mapping[str, Any]) -> EvaluationProtocol | None:
    """None of another version's evaluation."""
    return EvaluationProtocol.read(json.dumps(metrics.get("protocol")).encode())
