"""Checks before the long work: what configuration and data say about it, in seconds and before Ray starts."""

import math
from collections.abc import Iterable, Iterator

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.architecture import read_architecture
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.models import find_system

_NEEDED = {"train": "there is nothing to train on", "validation": "no epoch could be chosen"}


def check_training(config: ExperimentConfig, dataset: Dataset) -> list[str]:
    """Checks what `dsmip train` needs.

    Returns:
        Warnings: what will work, but hardly as it is meant.

    Raises:
        UserError: It cannot work.
    """
    for split, consequence in _NEEDED.items():
        if not dataset.num_mentions(split):
            raise UserError(
                f"{dataset.location}: has no mention of {split}, so {consequence}; prepare it from a release that has "
                "some, or with --split 70/10/20 where the layout has that choice"
            )
    find_system(config.model).check(config, Backbone.checked(config.backbone.architecture, config.backbone.pretrained))
    return [*image_warnings(config, dataset), *warmup_warnings(config, dataset)]


def check_trials(configs: Iterable[ExperimentConfig]) -> None:
    """Checks what trials of stage two ask of the towers. Their weights are not read: features may be there already.

    Raises:
        UserError: The towers cannot hold it.
    """
    backbones: dict[str, Backbone] = {}
    for config in configs:
        name = config.backbone.architecture
        if name not in backbones:
            backbones[name] = Backbone.build(name, None, device="meta")
        find_system(config.model).check(config, backbones[name])


def image_warnings(config: ExperimentConfig, dataset: Dataset) -> Iterator[str]:
    """A warning where images are stored smaller than the backbone takes them.

    Raises:
        UserError: The backbone is unknown.
    """
    stored, size = dataset.manifest.image, read_architecture(config.backbone.architecture).image_size
    if not stored.keep_original and stored.size < size:
        yield (
            f"warning: {dataset.location} has pictures of at most {stored.size} pixels (shorter side), and "
            f"{config.backbone.architecture} takes {size}: they are enlarged; "
            f"'dsmip prepare --image-size {size}' keeps more of them"
        )


def warmup_warnings(config: ExperimentConfig, dataset: Dataset) -> Iterator[str]:
    """A warning for each part whose learning rate grows for most of its steps."""
    mentions = dataset.num_mentions("train") * (1 - config.held_out)
    for part in find_system(config.model).part_names(config.system):
        train = config.train_of(part)
        steps = train.epochs * math.ceil(mentions / train.batch_size)
        if 2 * train.warmup_steps > steps:
            yield (
                f"warning: {part}: the learning rate grows during {train.warmup_steps} of about {steps} steps "
                f"(train.warmup_steps, train.epochs, train.batch_size); a tenth of all would be {max(steps // 10, 1)}"
            )
