"""The schema of an experiment configuration: frozen, validated, errors name the key and the nearest valid one.

A system (a file in `dsmip/models/`) owns the class that validates its `system:` section; this file owns the rest.
Files and texts become configurations in `dsmip/runs/load_config.py`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dsmip.errors import UserError
from dsmip.separate_towers import TOWER_KEYS, with_architecture

Scalar = str | int | float | bool | None
WatchTool = Literal["tensorboard", "mlflow", "wandb"]
Config = TypeVar("Config", bound=BaseModel)


class Frozen(BaseModel):
    """Base of every configuration class: immutable, unknown keys are errors, defaults are validated too.

    Attributes:
        added: Fields that came after results had been stored, each with the value (as in YAML) that means what was
            before: with it, keys stay what they were (`dsmip.keys.key_tree`).
        short_for: Keys that may be written in place of a field.
    """

    added: ClassVar[Mapping[str, Any]] = {}
    short_for: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Resources(Frozen):
    """What one worker or trial asks of Ray; fractions are allowed."""

    cpu: float = Field(1.0, ge=0)
    gpu: float = Field(0.0, ge=0)


class Workers(NamedTuple):
    """How many workers a training has: any number from `least` to `most` that the cluster has room for."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


def _workers(value: Any) -> Workers:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
    workers = Workers(int(found[1]), int(found[2] or found[1])) if found else Workers(0, 0)
    if not 1 <= workers.least <= workers.most:
        raise ValueError(f"give a number of workers, or a range such as 1..4, not {value!r}")
    return workers


def _dumped_workers(workers: Workers) -> int | str:
    return workers.least if workers.least == workers.most else str(workers)


WorkersField = Annotated[Workers, PlainValidator(_workers), PlainSerializer(_dumped_workers)]


class Running(Frozen):
    """How a training is run, which changes none of its results but by rounding.

    One exception: with `negatives: local` each worker contrasts with its own share of a batch, so their number counts.

    Attributes:
        workers: A number, or `1..4` for as many as there is room for: it goes on with fewer when a node is lost.
        checkpoint_steps: Save after so many steps, besides after each epoch; null: after epochs only.
        restarts: How often it goes on from its checkpoint after workers were lost; machines that are taken away with
            notice do not count.
        stall_minutes: A worker that has made no step for so long writes what it was doing to a file and ends, as if
            lost.
    """

    workers: WorkersField = Workers(1, 1)
    resources: Resources = Resources()
    checkpoint_steps: int | None = Field(None, ge=1)
    restarts: int = Field(3, ge=0)
    stall_minutes: float = Field(30.0, gt=0)


class BackboneConfig(Frozen):
    """Which network the towers come from, or which two.

    Attributes:
        architecture: An open_clip name, the name of a shipped JSON (`tiny`), a path to a JSON of that form, or the text
            of a `SeparateTowers`, which the keys `text`, `vision` and `embed_dim` may be written for.
        pretrained: A tag, a hub id (`hf-hub:...`), a file or folder, or null for random weights (of a pair: its own).
    """

    short_for: ClassVar[tuple[str, ...]] = TOWER_KEYS

    architecture: str
    pretrained: str | None = None

    _pair = model_validator(mode="before")(with_architecture)


class AugmentConfig(Frozen):
    """Random changes of training items; the defaults change nothing. Those not named here are probabilities.

    Attributes:
        scale: Magnification from 1 - scale to 1 / (1 - scale).
        shift: Fraction of the picture.
        rotation: Degrees.
        colour: Strength of brightness, contrast and saturation changes.
        hue: Fraction of the colour circle.
        padding: What comes in from outside.
        drop_tokens: Per token.
        drop_pictures: Per item.
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


class OptimizerConfig(Frozen):
    """AdamW's own settings; rates are the training's.

    Attributes:
        decay: What `weight_decay` is put on. matrices: all but vectors, so norms and biases are spared, as is usual.
            all_but_biases: norms and single vectors decay, too, as in the published MIMIC and its relatives.
    """

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    decay: Literal["matrices", "all_but_biases"] = "matrices"


class TrainConfig(Frozen):
    """One stage-one or stage-two training. Batch sizes count mentions over all workers.

    Attributes:
        extra_negatives: Random entities of the kb added to each batch's columns (in stage two, on cached features,
            without repetition: as many as the kb has are all of it).
        hard_negatives: Of each mention, so many entities added that scored best when they were last looked for (every
            `hard_negatives_every` epochs), without its gold and what reads like it; at first none.
        self_mentions: Random entities of the kb that a batch also links to themselves, their text and picture changed
            by `self_augment` (towers that train only: with few mentions this teaches the whole kb's words and looks).
        validate_every, patience: Epochs; the last epoch is always validated.
        validate_entities: Epochs between are validated, too, over so many entities: the validation mentions' golds and
            a fixed draw of others. Metrics are named `subset_...`, and neither `patience` nor the choice of the best
            epoch reads them. Of parts whose validation ranks the kb: no re-rankers, no gates fitted by likelihood.
        compile: Towers that train have their layers compiled (`torch.compile`) at the first step. Meant for GPUs.
    """

    _optimizer: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8, "decay": "matrices"}
    added: ClassVar[Mapping[str, Any]] = {
        "optimizer": _optimizer,
        "hard_negatives": 0,
        "hard_negatives_every": 1,
        "validate_entities": None,
    }

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=2)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    tower_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    negatives: Literal["gathered", "local"] = "gathered"
    extra_negatives: int = Field(0, ge=0)
    hard_negatives: int = Field(0, ge=0)
    hard_negatives_every: int = Field(1, ge=1)
    self_mentions: int = Field(0, ge=0)
    validate_every: int = Field(1, ge=1)
    validate_entities: int | None = Field(None, ge=1)
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
    """Stage two: search space (dotted keys), budget (draws, or all of a grid), what overrides the frame's `train`."""

    trials: Annotated[int, Field(ge=1)] | Literal["all"] = 8
    rungs: tuple[int, ...] = (2, 6, 18)
    reduction: int = Field(3, ge=2)
    resources: Resources = Resources()
    space: dict[str, Choice] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_searched(self) -> "TuneConfig":
        if not self.rungs or self.rungs[0] < 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError(f"rungs are epochs that grow, starting at 1 or more; got {list(self.rungs)}")
        ranges = [key for key, choice in self.space.items() if choice.values is None]
        if self.trials == "all" and ranges:
            raise ValueError(f"trials: all tries every setting of a grid, but {ranges[0]} is a range: list its values")
        return self


class PretrainConfig(Running):
    """Contrastive training of the backbone on the kb's own pairs (`dsmip pretrain`): all, or projections alone."""

    added: ClassVar[Mapping[str, Any]] = {"towers": "tuned"}

    towers: Literal["tuned", "locked"] = "tuned"
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(20, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: AugmentConfig = AugmentConfig()


class ExperimentConfig(Frozen):
    """Everything that decides a run's figures, besides the data; made and validated by `dsmip.runs.load_config`.

    Attributes:
        held_out: Share of the golds whose training mentions stage one never sees and stage two trains on. 0 is the
            paper: both stages see all, and a gate then judges experts on mentions that they know by heart.
        watch: Tools that show figures while trainings run (`dsmip/training/trackers.py`); they change no result.
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


def merged(base: Config, overrides: Mapping[str, Any]) -> Config:
    """`base` with some keys replaced (nested mappings are merged), validated again."""
    return type(base).model_validate(deep_merged(base.model_dump(), overrides))


def deep_merged(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `overrides` put in; mappings in both are merged likewise."""
    result = dict(base)
    for key, value in overrides.items():
        nested = result.get(key)
        result[key] = deep_merged(nested, value) if isinstance(nested, dict) and isinstance(value, Mapping) else value
    return result


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}


def validated(config_class: type[Config], tree: Any, source: str, prefix: str) -> Config:
    """A validated object of `tree`.

    Raises:
        UserError: Keys are wrong; each is named, below `prefix`.
    """
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(detail, config_class, prefix) for detail in error.errors())
        raise UserError(f"{source}: {problems}") from error


def _explain(detail: ErrorDetails, root: type[BaseModel], prefix: str) -> str:
    loc = [str(each) for each in detail["loc"]]
    key = prefix + ".".join(each for each in loc if not re.search(r"^constrained-|\[", each))  # of a union: no keys
    if detail["type"] != "extra_forbidden":
        return (f"{key.rstrip('.')}: " if key else "") + detail["msg"].removeprefix("Value error, ")
    valid = _keys_at(root, detail["loc"][:-1])
    near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1, cutoff=0.0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown key '{key}'{hint} (valid here: {', '.join(valid)})"


def _keys_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for step in path:
        field = model.model_fields.get(str(step))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            continue
        model = inner
    return sorted([*model.model_fields, *(model.short_for if issubclass(model, Frozen) else ())])


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _model_in(argument)) is not None:
            return found
    return None
