"""Checks before the long work: what configuration and data say about it, in seconds and before Ray starts."""

from collections.abc import Iterator

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.encoders.architecture import read_architecture
from dsmip.errors import UserError

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
    return list(image_warnings(config, dataset))


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
