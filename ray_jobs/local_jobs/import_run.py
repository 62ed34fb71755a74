"""The job `dsmip import`: a released checkpoint of a published system becomes a run that can be evaluated."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.clip import Backbone
from dsmip.encoders.formats.lightning import read_checkpoint
from dsmip.errors import UserError
from dsmip.models import find_system, systems
from dsmip.models.base import System
from dsmip.runs.checks import check_texts, image_warnings
from dsmip.runs.load_config import changed, job_config, shipped_configs
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file
from dsmip.storage.locations import Location
from dsmip.units.shared_clip import SharedClipMatcher
from ray_jobs.terminal.lines import say

IMPORTED = "imported"  # in a part's report: what it was made of


def import_run(
    name: str, checkpoint: Path, location: Location, data: str, *, config: str | None, overrides: Sequence[str]
) -> Run:
    """Makes a run whose only part has a checkpoint's weights; the same one that is there already stays.

    Args:
        name: The system's.
        checkpoint: The file.
        location: Where the run goes.
        data: Where the dataset is that it is evaluated on.
        config: A shipped configuration's name, with what a release has otherwise, or a YAML file; None: the system's
            published one of WikiMEL.
        overrides: `key=value` of it.

    Raises:
        UserError: The file is no checkpoint of the system or does not fit the configuration, or the run holds something
            else.
    """
    system = _importable(name)
    if config is None or config in shipped_configs():
        overrides = [*system.released_with, *overrides]
    settings = _without_weights(job_config(config or system.published_config, overrides), system, config)
    found = read_checkpoint(checkpoint)
    _check_system(found.tensors, system, checkpoint)
    dataset = Dataset.open(data)
    check_texts(settings, dataset)
    system.check(settings, Backbone.build(settings.backbone.architecture, None, device="meta"))
    matcher = system.build_part(name, settings, with_encoder=True)
    assert isinstance(matcher, SharedClipMatcher)  # as every system with a `published_sign`
    try:
        matcher.load_published_state_dict(found.tensors)
    except UserError as error:
        raise UserError(
            f"checkpoint {checkpoint}: {error}; give the configuration that it was trained with by --config or --set"
        ) from None
    about = {
        "file": checkpoint.name,
        "sha256": sha256_file(checkpoint),
        "epoch": found.epoch,
        "lightning": found.version,
    }
    for warning in image_warnings(settings, dataset):
        say(warning)
    run = Run.create(location, settings, dataset)
    if run.has_begun:
        if not run.is_finished(name) or run.part_report(name).get(IMPORTED) != about:
            raise UserError(f"run {run.storage} holds another '{name}', which is kept; give a new folder for --run")
    else:
        with run.recorded("import"):
            run.save_part(name, matcher, {"best": {}, "history": [], IMPORTED: about})
    epoch = "" if found.epoch is None else f", epoch {found.epoch}"
    say(f"{run.storage}: {name} with the weights of {checkpoint} ({len(found.tensors)} tensors{epoch})")
    say(f"  next: {shlex.join(['dsmip', 'evaluate', '--run', str(run.storage), '--split', 'test'])}")
    return run


def _importable(name: str) -> type[System]:
    system = find_system(name)
    if not system.published_sign:
        known = ", ".join(other for other, each in sorted(systems().items()) if each.published_sign)
        raise UserError(f"{name}: no released checkpoints are known of it; there are of {known}")
    return system


def _without_weights(config: ExperimentConfig, system: type[System], source: str | None) -> ExperimentConfig:
    """The configuration whose towers come with the checkpoint alone."""
    if config.model != system.name:
        raise UserError(
            f"--config {source} is of {config.model}, not of {system.name}; "
            f"leave it out to take {system.published_config}"
        )
    if config.system.tune != "full":
        raise UserError(
            f"system.tune is {config.system.tune}: a checkpoint of {system.name} brings towers of its own, which a run "
            "keeps where they are trained whole; set it to full"
        )
    return changed(config, {"backbone": {"pretrained": None}})


def _check_system(tensors: Mapping[str, Tensor], system: type[System], checkpoint: Path) -> None:
    """Checks whose checkpoint it is, by the names of its tensors."""

    def has(sign: str) -> bool:
        return bool(sign) and any(name.startswith(sign) for name in tensors)

    if has(system.published_sign):
        return
    if other := next((name for name, each in sorted(systems().items()) if has(each.published_sign)), None):
        raise UserError(f"{checkpoint} is a checkpoint of {other}, not of {system.name}: dsmip import {other} takes it")
    some = ", ".join(sorted(tensors)[:3])
    raise UserError(
        f"{checkpoint} is no released checkpoint of {system.name}: it has tensors such as {some}, and none "
        f"{system.published_sign}*"
    )
