"""The schema of a suite: systems, data sets, seeds, shares and ablations in a YAML file, checked as a whole."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from dsmip.config import Choice, Frozen, deep_merged, validated
from dsmip.errors import UserError
from dsmip.evaluation.metrics import METRICS
from dsmip.storage.parsing import parse_yaml

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # of folders and of rows
_PACKAGE, _SHIPPED = "dsmip.suites", "shipped"


class SuiteData(Frozen):
    """A data set: a folder of the data root, by its name.

    Attributes:
        label: As tables have it (default: the name).
        drawn: Keys of the demo's world: it is drawn instead, and needs no data root.
        backbone: A configuration by which a backbone is trained on the set's own knowledge base before all else, for
            every system and seed on it.
    """

    label: str | None = None
    drawn: dict[str, Any] | None = None
    backbone: str | None = None


class SuiteSystem(Frozen):
    """A system with its settings: trained on each data set with each share and seed.

    Attributes:
        label: As tables have it (default: the name).
        config: A shipped configuration or a YAML file; `{data}` is the data set's name.
        set: Keys of the configuration that differ from it.
        rows: What is evaluated, by model, each with a label: a part, a fusion, the system's name (default: this alone).
        data: Other folders of the data root than that of a data set's name, by that name.
    """

    label: str | None = None
    config: str
    set: dict[str, Any] = Field(default_factory=dict)
    rows: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)


class Ablation(Frozen):
    """A system that is another one (`of`) but for some keys of its configuration; the rest is as of `SuiteSystem`."""

    label: str | None = None
    of: str
    set: dict[str, Any]
    rows: dict[str, str] = Field(default_factory=dict)


class Space(Frozen):
    """A space of which stage two tries `trials` settings, by validation figures alone: as `tune` of a configuration."""

    trials: Annotated[int, Field(ge=2)] | Literal["all"]
    rungs: tuple[int, ...]
    reduction: int = Field(3, ge=2)
    space: dict[str, Choice] = Field(min_length=1)


class Significance(Frozen):
    """Tests of each other row against the row `of`, over all data sets and shares, corrected over all of them."""

    of: str
    metric: str = "hits@1"


class Suite(Frozen):
    """Experiments of systems on data sets.

    Attributes:
        title, about: Of the tables.
        shares: Of the training mentions, the first of the release; 1 is all.
        metrics: Columns of the tables.
        search: The one of `spaces` that gated systems search; null: one trial with the configuration's own settings.
    """

    title: str
    about: str = ""
    data: dict[Name, SuiteData] = Field(min_length=1)
    systems: dict[Name, SuiteSystem] = Field(min_length=1)
    ablations: dict[Name, Ablation] = Field(default_factory=dict)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((1.0,), min_length=1)
    metrics: tuple[str, ...] = Field(("hits@1", "hits@3", "hits@5", "mean_rank"), min_length=1)
    significance: Significance | None = None
    search: str | None = None
    spaces: dict[str, Space] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, values in (("seeds", self.seeds), ("shares", self.shares), ("metrics", self.metrics)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {', '.join(map(str, values))} has something twice")
        tested = [] if self.significance is None else [self.significance.metric]
        for name in (*self.metrics, *tested):
            if name not in METRICS:
                raise ValueError(f"unknown metric '{name}'; there are {', '.join(METRICS)}")
        if tested and not METRICS[tested[0]].is_mean:
            raise ValueError(f"significance.metric: {tested[0]} is no mean over mentions, as a test needs")
        if tested and len(self.seeds) < 2:
            raise ValueError(
                f"significance is asked of one seed ({self.seeds[0]}), which cannot tell a system from its luck; give "
                "seeds at least two, or leave significance out"
            )
        if self.search is not None and self.search not in self.spaces:
            raise ValueError(f"search: unknown space '{self.search}'; spaces has {', '.join(self.spaces) or 'none'}")
        self._check_names()
        return self

    def _check_names(self) -> None:
        for name, ablation in self.ablations.items():
            if name in self.systems:
                raise ValueError(f"ablations.{name}: a system has this name already")
            if ablation.of not in self.systems:
                raise ValueError(
                    f"ablations.{name}.of: unknown system '{ablation.of}'; there are {', '.join(self.systems)}"
                )
        for name, system in self.systems.items():
            if unknown := system.data.keys() - self.data.keys():
                raise ValueError(
                    f"systems.{name}.data: unknown data set '{min(unknown)}'; there are {', '.join(self.data)}"
                )

    def all_systems(self) -> dict[str, SuiteSystem]:
        """The systems by name, ablations among them."""
        found = dict(self.systems)
        for name, ablation in self.ablations.items():
            base = self.systems[ablation.of]
            found[name] = SuiteSystem(
                label=ablation.label,
                config=base.config,
                set=deep_merged(base.set, ablation.set),
                rows=ablation.rows,
                data=base.data,
            )
        return found


class CountedParameters(Frozen):
    """A row of a table of parameter counts.

    Attributes:
        config, set: As of `SuiteSystem`.
        part: Of the configuration's system (default: its first).
    """

    label: str | None = None
    config: str
    set: dict[str, Any] = Field(default_factory=dict)
    part: str | None = None


class ParameterSuite(Frozen):
    """A table of parameter counts, which needs no data and trains nothing."""

    title: str
    about: str = ""
    parameters: dict[Name, CountedParameters] = Field(min_length=1)


def shipped_suites() -> list[str]:
    """Names of the suites that come with the package."""
    folder = resources.files(_PACKAGE) / _SHIPPED
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_suite(name_or_path: str) -> Suite | ParameterSuite:
    """Reads a shipped suite (by name) or a YAML file.

    Raises:
        UserError: An unknown name, wrong YAML, an unknown key or a value that cannot be.
    """
    if name_or_path in shipped_suites():
        text = (resources.files(_PACKAGE) / _SHIPPED / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(
                f"suite '{name_or_path}' is neither a file nor a shipped name; shipped: {', '.join(shipped_suites())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"suite {name_or_path} cannot be read as text: {error}") from error
    source = f"suite {name_or_path}"
    tree = parse_yaml(text, source)
    if not isinstance(tree, Mapping):
        raise UserError(f"{source} must be a mapping of keys, not {type(tree).__name__}")
    kind: type[Suite] | type[ParameterSuite] = ParameterSuite if "parameters" in tree else Suite
    return validated(kind, dict(tree), source, "")
