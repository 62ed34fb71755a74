"""Checks of a training and of trials before the long work: by configuration and data, in seconds, without Ray."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dsmip.config import BackboneConfig, Choice, ExperimentConfig, Running, TrainConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import MENTION_DESC
from dsmip.encoders.architecture import build_tokenizer, read_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.weights import locate_weights, stored_activation
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.load_config import swept

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
    if dataset.num_mentions("train") < 2:
        raise UserError(f"{dataset.location}: has one mention of train, and a batch contrasts at least two")
    system = find_system(config.model)
    if reason := system.why_not_trained(config.system):
        raise UserError(reason)
    for part in system.part_names(config.system):
        _check_shares(f"parts.{part}", config.train_of(part), config.part(part))
    check_texts(config, dataset)
    backbone = Backbone.checked(config.backbone.architecture, config.backbone.pretrained)
    system.check(config, backbone)
    _check_tokenizer(config.backbone, backbone)
    warnings = [
        *image_warnings(config, dataset),
        *warmup_warnings(config, dataset),
        *_activation_warnings(config.backbone),
        *_negatives_warnings(config),
    ]
    if system.gated:
        for each in _space_corners(config):
            system.check(each, backbone)
        warnings += _rung_warnings(config)
    return warnings


def check_texts(config: ExperimentConfig, dataset: Dataset) -> None:
    """Checks that mentions have what their templates name.

    Raises:
        UserError: A template has descriptions, and the data none.
    """
    system = find_system(config.model)
    for part in dict.fromkeys((*system.part_names(config.system), *system.feature_parts(config.system))):
        template = system.item_format(config.system, part).template
        if template.reads_desc and MENTION_DESC not in dataset.manifest.choices:
            raise UserError(
                f"{dataset.location}: has no descriptions of mentions, and the template {template.mention!r} of {part} "
                "names {desc}; make them with 'dsmip enhance', or change system.template.mention"
            )


def check_trials(trials: Sequence[tuple[Mapping[str, Any], ExperimentConfig]]) -> None:
    """Checks what trials of stage two ask of the towers and of their rungs.

    The towers' weights are not read: features may be there already.

    Args:
        trials: What each changes, by dotted key, and its configuration.

    Raises:
        UserError: The towers cannot hold it, or a trial's training ends before the last rung.
    """
    backbones: dict[str, Backbone] = {}
    for changes, config in trials:
        name = config.backbone.architecture
        if name not in backbones:
            backbones[name] = Backbone.build(name, None, device="meta")
        find_system(config.model).check(config, backbones[name])
        if (last := config.tune.rungs[-1]) > (epochs := config.tune_train().epochs):
            searched = "train.epochs" in changes
            where = f"tune.space: a trial has train.epochs={epochs}" if searched else f"tune.train.epochs is {epochs}"
            raise UserError(f"tune.rungs ends at {last} epochs, but {where}")


def check_pretraining(config: ExperimentConfig, dataset: Dataset) -> list[str]:
    """Checks what `dsmip pretrain` needs.

    Returns:
        Warnings.

    Raises:
        UserError: It cannot work.
    """
    if (pictured := dataset.manifest.entities_with_image) < 2:
        raise UserError(f"{dataset.location}: fewer than two entities have a picture: nothing to contrast")
    backbone = Backbone.checked(config.backbone.architecture, config.backbone.pretrained)
    if backbone.text.is_absent or backbone.vision.is_absent:
        raise UserError(
            f"backbone {config.backbone.architecture} is one tower: 'dsmip pretrain' aligns a text and a vision tower"
        )
    _check_tokenizer(config.backbone, backbone)
    settings = config.pretrain
    steps = settings.epochs * math.ceil(pictured / settings.batch_size)
    warnings = [*image_warnings(config, dataset), *_activation_warnings(config.backbone)]
    return [*warnings, *_warmup_warning("backbone", "pretrain", settings.warmup_steps, steps)]


def _negatives_warnings(config: ExperimentConfig) -> Iterator[str]:
    """Hard negatives that are asked for where nothing looks for them."""
    for part in find_system(config.model).rerankers(config.system):
        if config.part(part).train.get("hard_negatives"):
            yield f"parts.{part}.train.hard_negatives: a re-ranker learns from all system.candidates; it does nothing"
    if config.tune.train.get("hard_negatives") and getattr(getattr(config.system, "gate", None), "fuses", False):
        yield "tune.train.hard_negatives: a gate that fuses its experts learns from whole rankings; it does nothing"


def _check_tokenizer(config: BackboneConfig, backbone: Backbone) -> None:
    """Builds the text tower's tokenizer, and checks that they belong together.

    Raises:
        UserError: It cannot be had, or has tokens that the tower does not know.
    """
    if backbone.text.is_absent:
        return
    tokenizer, embedding = build_tokenizer(config.architecture), backbone.text.embedding
    if isinstance(embedding, nn.Embedding) and tokenizer.num_ids > embedding.num_embeddings:
        raise UserError(
            f"backbone {config.architecture}: its tokenizer has {tokenizer.num_ids} tokens, and its text tower embeds "
            f"{embedding.num_embeddings}: they are of different networks"
        )


def _check_shares(where: str, train: TrainConfig, plan: Running) -> None:
    """Checks that a worker that contrasts with its own share of a batch alone has something to contrast with.

    Raises:
        UserError: It has not.
    """
    if train.negatives == "local" and not train.extra_negatives and train.batch_size < 2 * plan.workers.most:
        raise UserError(
            f"{where}: negatives: local leaves each of {plan.workers.most} workers {train.batch_size} / "
            f"{plan.workers.most} mentions of a batch, and at least two are contrasted; ask a larger batch_size, fewer "
            "workers, or negatives: gathered"
        )


def _space_corners(config: ExperimentConfig) -> Iterator[ExperimentConfig]:
    """The configuration with each value, and with both ends of each range, of `tune.space`.

    Raises:
        UserError: One cannot be had; the key is named.
    """
    for key, choice in config.tune.space.items():
        for value in _corners(choice):
            yield swept(config, {key: value})


def _corners(choice: Choice) -> Sequence[Any]:
    if choice.values is not None:
        return [list(value) if isinstance(value, tuple) else value for value in choice.values]
    low, high = choice.uniform or choice.loguniform or (0.0, 0.0)
    return low, math.nextafter(high, low)  # the end itself is not drawn


def _rung_warnings(config: ExperimentConfig) -> Iterator[str]:
    """A warning where `tune` will refuse what can be said to it then: experts alone may be trained with any."""
    if (last := config.tune.rungs[-1]) > (epochs := config.tune_train().epochs):
        yield (
            f"warning: tune.rungs ends at {last} epochs, but tune.train.epochs is {epochs}: 'dsmip tune' will want "
            f"--set tune.rungs or --set tune.train.epochs"
        )


def _activation_warnings(backbone: BackboneConfig) -> Iterator[str]:
    """A warning where a file may be of an architecture's twin: open_clip has most with and without QuickGELU."""
    if not backbone.pretrained or not Path(backbone.pretrained).exists():
        return
    network = read_architecture(backbone.architecture)
    path = locate_weights(network, backbone.pretrained).path
    if network.is_open_clip and stored_activation(path) is None:
        yield (
            f"warning: nothing tells whether {path} was trained with QuickGELU, and {backbone.architecture} is "
            f"{'with' if network.quick_gelu else 'without'} it: with the wrong one it "
            "scores worse without a sign; look it up where the file comes from"
        )


def image_warnings(config: ExperimentConfig, dataset: Dataset) -> Iterator[str]:
    """A warning where images are stored smaller than the backbone takes them.

    Raises:
        UserError: The backbone is unknown.
    """
    name = config.backbone.architecture
    return enlarged_warnings(dataset, read_architecture(name).image_size, name)


def enlarged_warnings(dataset: Dataset, size: int, taker: str) -> Iterator[str]:
    """A warning where images are stored smaller than `size`, which `taker` wants."""
    stored = dataset.manifest.image
    if not stored.keep_original and stored.size < size:
        yield (
            f"warning: {dataset.location} has pictures of at most {stored.size} pixels (shorter side), and "
            f"{taker} takes {size}: they are enlarged; "
            f"'dsmip prepare --image-size {size}' keeps more of them"
        )


def warmup_warnings(config: ExperimentConfig, dataset: Dataset) -> Iterator[str]:
    """A warning for each part whose learning rate grows for most of its steps."""
    mentions = dataset.num_mentions("train") * (1 - config.held_out)
    for part in find_system(config.model).part_names(config.system):
        train = config.train_of(part)
        steps = train.epochs * math.ceil(mentions / train.batch_size)
        yield from _warmup_warning(part, "train", train.warmup_steps, steps)


def _warmup_warning(name: str, section: str, warmup_steps: int, steps: int) -> Iterator[str]:
    if 2 * warmup_steps > steps:
        yield (
            f"warning: {name}: the learning rate grows during {warmup_steps} of about {steps} steps "
            f"({section}.warmup_steps, {section}.epochs, {section}.batch_size); "
            f"a tenth of all would be {max(steps // 10, 1)}"
        )
