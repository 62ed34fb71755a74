"""The graph of a suite's steps: each a command of dsmip, what must be there before it, and what is there after it.

Whatever a step makes is complete once it is there (all files are atomic), so what is there need not be made again.

<out>/data/      data sets that are drawn, and views with a share of the training mentions
<out>/backbones/ weights that are trained on a data set's knowledge base
<out>/configs/   each member's whole configuration
<out>/runs/      each member's run
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from dsmip.config import Resources, TuneConfig
from dsmip.evaluation.stored.layout import METRICS_FILE, evaluation_name
from dsmip.models import find_system
from dsmip.runs.loaded_model import PART
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.suites.members import Member, backbone_file, percent
from dsmip.suites.schema import Suite

Kind = Literal["data", "backbone", "train", "tune", "evaluate"]
KINDS: tuple[Kind, ...] = ("data", "backbone", "train", "tune", "evaluate")
SPLIT = "test"
_EVALUATION_CPUS = 4  # threads that a ranking on CPUs has; more gain little beside other steps


@dataclass(frozen=True, slots=True)
class Step:
    """A step.

    Attributes:
        name: Unique.
        arguments: Of `dsmip`.
        needs: Names of steps that come first.
        outcomes: Files that are there when it is done.
        cpu, gpu: What it asks when all of it runs at once; with less it takes longer.
    """

    name: str
    kind: Kind
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    outcomes: tuple[Path, ...]
    cpu: float = 1.0
    gpu: float = 0.0

    @property
    def done(self) -> bool:
        return all(path.is_file() for path in self.outcomes)


@dataclass(frozen=True, slots=True)
class Places:
    """Where a suite reads and writes.

    Attributes:
        data_root: None where all data sets are drawn.
        device: Of evaluations: cpu or cuda.
    """

    data_root: Path | None
    out: Path
    device: str = "cpu"

    def run(self, member: Member) -> Path:
        return self.out / "runs" / member.name

    def config(self, member: Member) -> Path:
        return self.out / "configs" / f"{member.name}.yaml"

    def world(self, data: str) -> Path:
        """The file of a data set that is drawn."""
        return self.out / "configs" / data / "world.yaml"

    def base(self, suite: Suite, data: str, folder: str) -> Path:
        """The data set with all its training mentions."""
        drawn = suite.data[data].drawn is not None or self.data_root is None
        return self.out / "data" / folder if drawn else (self.data_root or self.out) / folder

    def data(self, suite: Suite, member: Member) -> Path:
        """The data set that a member trains on."""
        column = member.column
        if column.share == 1:
            return self.base(suite, column.data, member.folder)
        return self.out / "data" / f"{member.folder}-first-{percent(column.share).removesuffix(' %')}"


def suite_steps(suite: Suite, members: Sequence[Member], places: Places) -> dict[str, Step]:
    """All steps by name, each after those that it needs."""
    steps: dict[str, Step] = {}
    for member in members:
        for step in (*_data_steps(suite, member, places), *_member_steps(suite, member, places)):
            steps.setdefault(step.name, step)
    return steps


def wanted(steps: Mapping[str, Step], names: Iterable[str]) -> dict[str, Step]:
    """These steps and all that they need, in the order of `steps`."""
    found, left = set[str](), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += steps[name].needs
    return {name: step for name, step in steps.items() if name in found}


def steps_of(steps: Mapping[str, Step], member: Member) -> dict[str, Step]:
    """A member's own steps."""
    return {name: step for name, step in steps.items() if name.startswith(f"{member.name}/")}


def _data_steps(suite: Suite, member: Member, places: Places) -> Iterable[Step]:
    column, about = member.column, suite.data[member.column.data]
    base, used = places.base(suite, column.data, member.folder), places.data(suite, member)
    before: tuple[str, ...] = ()
    if about.drawn is not None:
        arguments = ("prepare", str(places.world(column.data)), str(base), "--format", "demo", "--name", column.data)
        yield Step(f"data/{member.folder}", "data", arguments, (), (base / MANIFEST_FILE,))
        before = (f"data/{member.folder}",)
    if used != base:
        cut = ("--train-fraction", f"{column.share:g}", "--take", "first")
        yield Step(
            f"data/{used.name}", "data", ("prepare", str(base), str(used), *cut), before, (used / MANIFEST_FILE,)
        )
    if about.backbone is not None:
        weights = backbone_file(places.out, column.data)
        arguments = ("pretrain", "--config", about.backbone, "--data", str(base), "--out", str(weights))
        plan = member.config.pretrain
        cpu, gpu = _asked([plan.resources], [plan.workers.least])
        yield Step(f"backbones/{column.data}", "backbone", arguments, before, (weights,), cpu, gpu)


def _member_steps(suite: Suite, member: Member, places: Places) -> Iterable[Step]:
    config, run, name = member.config, places.run(member), member.name
    system = find_system(config.model)
    parts = system.part_names(config.system)
    data = [step.name for step in _data_steps(suite, member, places)]
    where = ("--data", str(places.data(suite, member)), "--run", str(run))
    train = ("train", "--config", str(places.config(member)), *where)
    plans = [config.part(part) for part in parts]
    cpu, gpu = _asked([plan.resources for plan in plans], [plan.workers.least for plan in plans])
    files = tuple(run / part / PART for part in parts)
    yield Step(f"{name}/train", "train", train, tuple(data), files, cpu, gpu)
    trained = f"{name}/train"
    if system.gated:
        tune = ("tune", "--run", str(run), "--seed", str(member.seed))
        cpu, gpu = _asked([config.tune.resources], [_most_trials(config.tune)])
        yield Step(f"{name}/tune", "tune", tune, (trained,), (run / system.name / PART,), cpu, gpu)
        trained = f"{name}/tune"
    for model in member.models:
        evaluate = ("evaluate", "--run", str(run), "--split", SPLIT, "--model", model, "--device", places.device)
        written = run / evaluation_name(SPLIT, model) / METRICS_FILE
        gpu = float(places.device == "cuda")
        step = f"{name}/evaluate-{model}"
        yield Step(step, "evaluate", evaluate, (trained,), (written,), _EVALUATION_CPUS, gpu)
        trained = step  # one after the other: they read and write the same features and indexes


def _asked(resources: Sequence[Resources], workers: Sequence[int]) -> tuple[float, float]:
    """CPUs and GPUs of all workers together."""
    pairs = list(zip(resources, workers, strict=True))
    return sum(each.cpu * count for each, count in pairs), sum(each.gpu * count for each, count in pairs)


def _most_trials(tune: TuneConfig) -> int:
    """Of a sweep at once; a grid has the configuration's own setting, too, where it is none of its own."""
    if tune.trials != "all":
        return tune.trials
    return 1 + prod(len(choice.values or ()) for choice in tune.space.values())
