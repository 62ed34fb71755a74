"""The frame of an experiment configuration: frozen, validated, with errors that name the key and the nearest valid one.

A system (a file in `dsmip/models/`) owns the class that validates its `system:` section; this file owns the rest and
the way from a YAML and `--set key=value` to a validated object. No path is looked at here.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, model_validator

from dsmip.errors import UserError
from dsmip.frozen import Frozen, validated
from dsmip.keys import key_tree
from dsmip.running import Resources, Running

Scalar = str | int | float | bool | None
WatchTool = Literal["tensorboard", "mlflow", "wandb"]


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number (YAML 1.1 wants a dot, and reads text)."""


class _Dumper(yaml.SafeDumper):
    """Writes for `_Loader`: text that it would take for a number is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


class BackboneConfig(Frozen):
    """Which CLIP the towers come from.

    architecture: an open_clip name, the name of a shipped JSON (`tiny`) or a path to a JSON of that form.
    pretrained: an open_clip tag, a hub id (`hf-hub:...`), a local weights file, or null for random weights.
    """

    architecture: str
    pretrained: str | None = None


class AugmentConfig(Frozen):
    """Random changes of training items; the defaults change nothing.

    scale: magnification from 1 - scale to 1 / (1 - scale). shift, erase_area: fractions of the picture. rotation:
    degrees. colour: strength of brightness, contrast and saturation changes. hue: fraction of the colour circle. The
    rest are probabilities; drop_tokens is per token, drop_pictures per item.
    """

    scale: float = Field(0.0, ge=0, lt=1)
    shift: float = Field(0.0, ge=0, lt=1)
    rotation: float = Field(0.0, ge=0, le=180)
    flip: float = Field(0.0, ge=0, le=1)
    colour: float = Field(0.0, ge=0, lt=1)
    hue: float = Field(0.0, ge=0, le=0.5)
    grayscale: float = Field(0.0, ge=0, le=1)
    erase: float = Field(0.0, ge=0, le=1)
    padding: Literal["border", "white"] = "border"
    drop_tokens: float = Field(0.0, ge=0, lt=1)
    drop_pictures: float = Field(0.0, ge=0, lt=1)


class TrainConfig(Frozen):
    """One stage-one or stage-two training. Batch sizes count mentions over all workers.

    extra_negatives: random entities of the kb added to each batch's columns (in stage two, on cached features, without
    repetition: as many as the kb has are all of it).
    self_mentions: random entities of the kb that a batch also links to themselves, their text and picture changed by
    `self_augment` (towers that train only: with few mentions this teaches the whole kb's words and looks).
    validate_every, patience: epochs; the last epoch is always validated.
    compile: towers that train have their layers compiled (`torch.compile`) at the first step. Meant for GPUs.
    """

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=2)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    tower_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    negatives: Literal["gathered", "local"] = "gathered"
    extra_negatives: int = Field(0, ge=0)
    self_mentions: int = Field(0, ge=0)
    validate_every: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)
    augment: AugmentConfig = AugmentConfig()
    self_augment: AugmentConfig = AugmentConfig(drop_tokens=0.6)


class PartConfig(Running):
    """How one part is trained: how it is run, and what differs from `train`."""

    train: dict[str, Any] = Field(default_factory=dict)


class Choice(Frozen):
    """A search dimension: a list of values (a value may be a list of names), or a range to draw from."""

    values: tuple[Scalar | tuple[str, ...], ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Choice":
        given = [name for name in ("values", "uniform", "loguniform") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of values, uniform, loguniform")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError("the lower bound must be below the upper bound")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("a loguniform range must be positive")
        return self

    @property
    def example(self) -> Any:
        """One of its values."""
        first = (self.values or self.uniform or self.loguniform or (None,))[0]
        return list(first) if isinstance(first, tuple) else first


class TuneConfig(Frozen):
    """Stage two: the search space (dotted configuration keys) and the budget. `train` overrides the frame's `train`."""

    trials: int = Field(8, ge=1)
    rungs: tuple[int, ...] = (2, 6, 18)
    reduction: int = Field(3, ge=2)
    resources: Resources = Resources()
    space: dict[str, Choice] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rungs_grow(self) -> "TuneConfig":
        if not self.rungs or self.rungs[0] < 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError(f"rungs are epochs that grow, starting at 1 or more; got {list(self.rungs)}")
        return self


class PretrainConfig(Running):
    """Contrastive training of the backbone on the kb's own picture-text pairs (`dsmip pretrain`)."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(20, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: AugmentConfig = AugmentConfig()


class ExperimentConfig(Frozen):
    """Everything that decides a run's figures, besides the data. Made by `parse_config`, which validates `system`.

    held_out: share of the golds whose training mentions stage one never sees and stage two trains on. 0 is the paper:
    both stages see all, and a gate then judges experts on mentions that they know by heart.
    watch: tools that show figures while trainings run (`dsmip/trackers.py`); they change no result.
    """

    model: str
    backbone: BackboneConfig
    system: Any
    train: TrainConfig = TrainConfig()
    parts: dict[str, PartConfig] = Field(default_factory=dict)
    tune: TuneConfig = TuneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    cache_dtype: Literal["float32", "float16"] = "float32"
    held_out: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(0, ge=0)
    watch: tuple[WatchTool, ...] = ()

    @model_validator(mode="after")
    def _watch_once(self) -> "ExperimentConfig":
        if len(set(self.watch)) < len(self.watch):
            raise ValueError(f"watch names a tool twice: {', '.join(self.watch)}")
        return self

    def part(self, name: str) -> PartConfig:
        """Workers and resources of a part (defaults when the YAML does not name it)."""
        return self.parts.get(name, PartConfig())

    def train_of(self, part: str) -> TrainConfig:
        """The training configuration of one stage-one part."""
        return merged(self.train, self.part(part).train)

    def tune_train(self) -> TrainConfig:
        """The training configuration of a stage-two trial."""
        return merged(self.train, self.tune.train)

    def changed(self, overrides: Mapping[str, Any]) -> "ExperimentConfig":
        """A copy with some keys replaced (nested mappings are merged), validated again."""
        return parse_config(_deep_merge(self.model_dump(mode="json"), overrides))

    def to_yaml(self) -> str:
        """The whole configuration as YAML text that `load_config` reads back to an equal object."""
        return _yaml(self.model_dump(mode="json"))

    def key_text(self) -> str:
        """What stands for the configuration in a key (`dsmip.keys.key_tree`), as YAML text."""
        return _yaml(key_tree(self))


def _yaml(tree: Mapping[str, Any]) -> str:
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))


Config = TypeVar("Config", bound=BaseModel)


def merged(base: Config, overrides: Mapping[str, Any]) -> Config:
    """`base` with some keys replaced (nested mappings are merged), validated again."""
    return type(base).model_validate(_deep_merge(base.model_dump(), overrides))


def _deep_merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in overrides.items():
        nested = result.get(key)
        result[key] = _deep_merge(nested, value) if isinstance(nested, dict) and isinstance(value, Mapping) else value
    return result


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}


def shipped_configs() -> list[str]:
    """Names of the YAMLs that come with the package."""
    folder = resources.files("dsmip") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a shipped configuration (by name) or a YAML file, applies `key=value` overrides and validates.

    Raises UserError for an unknown name, wrong YAML, an unknown key or a value out of range.
    """
    if name_or_path in shipped_configs():
        text = (resources.files("dsmip") / "configs" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"config {name_or_path} cannot be read as text: {error}") from error
    else:
        raise UserError(
            f"config '{name_or_path}' is neither a file nor a shipped name; shipped: {', '.join(shipped_configs())}"
        )
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"config {name_or_path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config {name_or_path} must be a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        tree = _deep_merge(tree, _parse_override(override))
    return parse_config(tree, source=f"config {name_or_path}")


def parse_config(tree: Mapping[str, Any], source: str = "configuration") -> ExperimentConfig:
    """Validates a mapping, the search space with a value of each key included; UserError names each wrong key."""
    config = _parse(tree, source)
    for key, choice in config.tune.space.items():
        swept(config, {key: choice.example}, f"{source}, tune.space")
    return config


def swept(config: ExperimentConfig, changes: Mapping[str, Any], source: str = "tune.space") -> ExperimentConfig:
    """The configuration of a trial: `changes` by dotted key, of `system` or of the stage-two training (`train.<name>`).

    Raises UserError for other keys: stage one is over when a sweep starts.
    """
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        path = key.split(".")
        if path[0] not in ("system", "train") or len(path) == 1:
            raise UserError(
                f"{source}: '{key}' cannot be searched; keys are train.<name> (of stage two) and system.<name>"
            )
        place = tree["tune"] if path[0] == "train" else tree
        for step in path[:-1]:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise UserError(f"{source}: '{key}' is no key of the configuration: '{step}' has no keys below it")
        place[path[-1]] = value
    return _parse(tree, source)


def _parse(tree: Mapping[str, Any], source: str) -> ExperimentConfig:
    from dsmip.models import find_system  # the registry imports systems, and they import this file

    model = tree.get("model")
    if not isinstance(model, str):
        raise UserError(f"{source}: the key 'model' must name a system")
    system = find_system(model)
    section = validated(system.config_class, tree.get("system") or {}, source, "system.")
    config = validated(ExperimentConfig, {**tree, "system": section}, source, "")
    names = system.part_names(section)
    for name, part in config.parts.items():
        if name not in names:
            raise UserError(f"{source}: unknown part 'parts.{name}'; {model} has {', '.join(names)}")
        validated(TrainConfig, _deep_merge(config.train.model_dump(), part.train), source, f"parts.{name}.train.")
    validated(TrainConfig, _deep_merge(config.train.model_dump(), config.tune.train), source, "tune.train.")
    return config


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value (for example train.epochs=5), got '{text}'")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)
