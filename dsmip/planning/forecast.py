"""The forecast of a configuration on a data set: memory and seconds by step, and what does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsmip.config import ExperimentConfig, Running, TrainConfig
from dsmip.models import find_system
from dsmip.planning import amounts
from dsmip.planning.amounts import Counts
from dsmip.planning.machine import RAY_OF_TRAINING, Machines, Node
from dsmip.planning.probing.parts import SystemCosts
from dsmip.planning.probing.pretraining import PretrainCosts
from dsmip.planning.probing.probe import Cost
from dsmip.planning.schedule import Work
from dsmip.planning.steps import DECODED_BYTES, TILE_BYTES, Found, Frame, Problem, Step, mebibytes, no_node
from dsmip.planning.tuning import tuning

_KEPT_PAIRS = 1 << 30  # bytes of pictures that a pretraining keeps decoded (dsmip.training.pretraining)
_SLICE = 4096  # kb rows that are prepared at a time


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    counts: Counts
    costs: SystemCosts
    pretrain: PretrainCosts | None
    steps: Sequence[Step]
    problems: Sequence[Problem]


@dataclass(frozen=True)
class Forecaster:
    """Puts costs, counts and machines together.

    Attributes:
        trials: Of stage two, as they will be drawn.
        variants: Experts of other settings that a sweep trains first: the parts they are of.
    """

    config: ExperimentConfig
    costs: SystemCosts
    pretrain: PretrainCosts | None
    counts: Counts
    machines: Machines
    trials: int = 0
    variants: Sequence[str] = ()

    def forecast(self) -> Forecast:
        """Steps in their order, and what does not fit of each."""
        frame = Frame(self.config, self.costs, self.counts, self.machines)
        steps, problems = list[Step](), list[Problem]()
        for found, wrong in (
            _pretraining(frame, self.pretrain),
            _features(frame),
            *_training(frame),
            tuning(frame, self.trials, self.variants),
            _evaluation(frame),
        ):
            steps += found
            problems += wrong
        return Forecast(self.counts, self.costs, self.pretrain, steps, problems)


@dataclass(frozen=True)
class _Asked:
    """A training to be started. held: bytes beside a worker that has nothing to do; key: of its resources."""

    name: str
    plan: Running
    cost: Cost
    held: int
    key: str


def _pretraining(frame: Frame, costs: PretrainCosts | None) -> Found:
    if costs is None:
        return [], []
    plan, counts = frame.config.pretrain, frame.counts
    batches = amounts.steps_of(counts.entities_with_image, TrainConfig(batch_size=plan.batch_size))
    kept = min(counts.entities_with_image * costs.image_bytes, _KEPT_PAIRS)
    held = 5 * costs.module + kept + (costs.step.num_bytes or 0)
    asked = _Asked("backbone", plan, costs.step.cost * (plan.epochs * batches), held, "pretrain")
    remedy = f"set pretrain.batch_size below {plan.batch_size}"
    found, problems = _trainings(frame, "pretrain", [asked], remedy)
    return [replace(whole, about=_asks(plan)) for whole in found[1:]], problems


def _features(frame: Frame) -> Found:
    """The tables of frozen towers, which the first worker of each part makes; once for parts that share them."""
    seen, works, about = set[str](), list[Work](), list[str]()
    node: Node | None = None
    for name, part in frame.costs.parts.items():
        splits, encoder = amounts.training_tables(part), part.encoder
        asked = frame.config.part(name).resources
        found = frame.machines.node_for(asked.cpu, asked.gpu)
        if not splits or encoder is None or encoder.shared in seen or found is None:
            continue
        if encoder.shared:
            seen.add(encoder.shared)
        node, cost = found, amounts.encoding(encoder, frame.counts, splits)
        works.append(frame.work(name, cost, found, asked.cpu, asked.gpu, encoder.module + DECODED_BYTES))
        about.append(name)
    if node is None:
        return [], []
    outcome = frame.outcome(works)
    largest = max(each.memory for each in works)
    return [
        Step("features", outcome.seconds, largest, None, outcome.at_once, node=node.name, about=", ".join(about))
    ], []


def _training(frame: Frame) -> list[Found]:
    """All parts side by side, re-rankers after the others."""
    rerankers, found = find_system(frame.config.model).rerankers(frame.config.system), list[Found]()
    for later in (False, True):
        asked = [
            _Asked(name, frame.config.part(name), frame.training(part), frame.held_by(part), f"parts.{name}")
            for name, part in frame.costs.parts.items()
            if (name in rerankers) == later
        ]
        if asked:
            found.append(_trainings(frame, "train", asked, _smaller_batches(frame)))
    return found


def _smaller_batches(frame: Frame) -> str:
    sizes = [frame.config.train_of(name).micro_batch_size for name in frame.costs.parts]
    now = min((each for each in sizes if each), default=frame.config.train.batch_size)
    return (
        f"set train.micro_batch_size to {max(now // 2, 1)} (now {now}), or parts.NAME.resources.cpu higher so that "
        "fewer parts run at once"
    )


def _trainings(frame: Frame, command: str, asked: Sequence[_Asked], remedy: str) -> Found:
    """Trainings that start together: a step of each, then of all."""
    works, steps, problems, node = list[Work](), list[Step](), list[Problem](), None
    for each in asked:
        resources, count = each.plan.resources, each.plan.workers.least
        node = frame.machines.node_for(resources.cpu, resources.gpu)
        if node is None:
            return [], [no_node(each.name, resources.cpu, resources.gpu, f"{each.key}.resources")]
        one = frame.work(each.name, each.cost * (1 / count), node, resources.cpu, resources.gpu, each.held)
        card, wrong = frame.card(each.name, each.held, resources.gpu, node, each.key)
        problems += wrong
        title = f"{command} {each.name}"
        steps.append(Step(title, one.alone, one.memory, None, count, card, node.name, _asks(each.plan)))
        works.append(
            replace(
                one,
                demand=count * one.demand,
                cpu=count * one.cpu,
                gpu=count * one.gpu,
                memory=count * one.memory + RAY_OF_TRAINING,
            )
        )
    assert node is not None
    outcome = frame.outcome(works)
    about = f"{outcome.at_once} of {len(works)} parts at once" if len(works) > 1 else ""
    largest = max(step.worker_bytes for step in steps)
    whole, wrong = frame.whole(command, outcome, largest, node, about, remedy)
    return [*steps, *whole], [*problems, *wrong]


def _evaluation(frame: Frame) -> Found:
    """Of the test split, in one process without Ray."""
    node = frame.machines.node_for(0, 0.0)
    if node is None:
        return [], []
    costs, counts, machines = frame.costs, frame.counts, frame.machines
    first = [part for part in costs.parts.values() if part.kind != "reranker"]
    kb_is_there = costs.whole is not None or all(part.kind in ("cached", "nothing") for part in first)
    cost = amounts.evaluation(frame.config, costs, counts, "test", kb_is_there=kb_is_there)
    on_gpu = frame.is_local and node.gpus > 0
    seconds = node.seconds(cost, on_gpu=on_gpu, threads=max(int(node.cpus), 1)) + machines.start
    prepared = costs.whole.prepared if costs.whole is not None else first[0].prepared
    rows = min(counts.entities, _SLICE)
    held = 2 * prepared["entities"].of(rows, min(counts.entities_with_image, rows))
    held += prepared["mentions"].of(*counts.items("test")) + prepared["entities"].of(*counts.items("kb"))
    held += sum(each.num_bytes.module for each in costs.parts.values()) + TILE_BYTES + DECODED_BYTES
    if costs.whole is not None:
        held += amounts.kept_bytes(frame.config, costs.whole, counts, counts.mentions["test"])
    size = machines.process + held
    step = Step("evaluate", seconds, size, size, node=node.name, about="the test split, one process")
    if node.memory is None or size <= node.memory:
        return [step], []
    what = f"evaluate needs {mebibytes(size)} of memory, {mebibytes(node.memory)} are free on {node.name}"
    return [step], [Problem(what, "evaluate with --workers on several nodes, or set system.width lower")]


def _asks(plan: Running) -> str:
    gpu = f", {plan.resources.gpu:g} GPU" if plan.resources.gpu else ""
    return f"{plan.workers} worker{'s' * (plan.workers.most > 1)}, {plan.resources.cpu:g} CPU{gpu}"
