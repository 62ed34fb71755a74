"""The job `dsmip pretrain`: contrastive training of the backbone on the kb's own pairs, as one Ray Train run."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.cluster.connection import connected

# isort: split
from dsmip import distributed
from dsmip.config import ExperimentConfig, Running
from dsmip.data.dataset import Dataset
from dsmip.data.text import Template
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.keys import key_tree
from dsmip.models import find_system
from dsmip.runs.checks import check_pretraining
from dsmip.runs.load_config import read_config, to_yaml
from dsmip.runs.provenance import environment
from dsmip.storage.atomic import write_json
from dsmip.storage.parsing import read_json
from dsmip.training.pretraining import PairSource, pretrain
from dsmip.training.trackers import Watched, check_tools
from ray_jobs.cluster.resources import check_before_start
from ray_jobs.terminal.display import Display
from ray_jobs.training.context import RayContext
from ray_jobs.training.ray_train import Training, run_trainings


def pretrain_backbone(
    config: ExperimentConfig, dataset: Dataset, out: Path, display: Display, *, verbose: bool = False
) -> dict[str, Any]:
    """Trains and writes `out` (safetensors) and beside it `<out>.json`: settings, history, what made it; returns that.

    Run again it resumes; a finished file of the same settings and data is kept.

    Raises:
        UserError: When `out` holds something else, or the settings do not fit the data or the cluster.
        JobFailed: When the training failed.
    """
    check_tools(config.watch)
    out = out.resolve()
    stamp = weights_stamp(config, dataset.manifest_hash)
    if report := _finished(out, stamp):
        display.say(f"{out} is finished already")
        return report
    for line in check_pretraining(config, dataset):
        display.say(line)
    out.parent.mkdir(parents=True, exist_ok=True)  # or it is said now that it cannot be
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: this user may not write into {out.parent}")
    started = time.monotonic()
    work = out.with_name(f".{out.name}.{stamp['sha256'][:12]}")
    training = Training(
        name="backbone",
        loop=_loop,
        settings={"config": to_yaml(config), "data": dataset.location, "out": str(out), "stamp": stamp},
        num_epochs=config.pretrain.epochs,
        location=work,
        plan=config.pretrain,
        watched=Watched(out.with_name(f"{out.name}.watch"), "backbone", config.watch, config.model_dump(mode="json")),
    )
    check_before_start([training.request])
    with connected(verbose=verbose):
        run_trainings([training], display)
    shutil.rmtree(work, ignore_errors=True)
    report = _finished(out, stamp)
    display.say(f"{out}: {config.pretrain.epochs} epochs in {time.monotonic() - started:.0f} s")
    return report or {}


def _loop(context: RayContext, settings: Mapping[str, Any]) -> None:
    config = read_config(settings["config"])
    dataset = Dataset.open(settings["data"])
    backbone = Backbone.build(config.backbone.architecture, config.backbone.pretrained, seed=config.seed)
    network = resolve_architecture(config.backbone.architecture)
    pairs = PairSource(dataset, network, _template(config), config.pretrain, config.seed)
    history = pretrain(backbone, pairs, config.pretrain, context, seed=config.seed)
    if distributed.rank() == 0:
        out = Path(settings["out"])
        write_json(_report_path(out), {**settings["stamp"], "history": history, "made": environment()})
        backbone.save_weights(out)  # last: present means finished


def _template(config: ExperimentConfig) -> Template:
    system = find_system(config.model)
    return system.item_format(config.system, system.part_names(config.system)[0]).template


def weights_stamp(config: ExperimentConfig, manifest_hash: str) -> dict[str, Any]:
    """What the weights depend on, and its hash."""
    tree = key_tree(config)
    settings = {name: tree[name] for name in ("model", "backbone", "pretrain", "seed")}
    for key in Running.model_fields:
        settings["pretrain"].pop(key, None)
    depends_on = {"settings": settings, "text": _template(config).entity, "data": manifest_hash}
    text = json.dumps(depends_on, sort_keys=True)
    return {**depends_on, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _finished(out: Path, stamp: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a finished `out` of this stamp, None when there is nothing.

    Raises:
        UserError: It holds something else.
    """
    path = _report_path(out)
    if not out.exists():
        return None
    if not (out.is_file() and path.is_file()):
        raise UserError(f"{out} exists and was not made by 'dsmip pretrain'; name another --out")
    report: dict[str, Any] = read_json(path, dict, f"; delete {out} to make it anew")
    if report.get("sha256") != stamp["sha256"]:
        raise UserError(f"{out} was made from other settings or data; name another --out or delete it")
    return report


def _report_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")
