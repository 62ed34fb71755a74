"""Steps of the way with their memory and seconds, problems with the key to set, and what both are worked out from."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsmip.config import ExperimentConfig
from dsmip.planning import amounts
from dsmip.planning.amounts import Counts
from dsmip.planning.machine import CUDA_BYTES, CUDA_HOST_BYTES, RAY_BYTES, Machines, Node
from dsmip.planning.probing.parts import PartCosts, SystemCosts
from dsmip.planning.probing.probe import Cost
from dsmip.planning.schedule import Outcome, Work, side_by_side, threads_of

STARTS = 1.6  # of an import: what a worker's start costs, Ray's own part of it included
DECODED_BYTES = 256 << 20  # of pictures that a worker keeps (dsmip.data.collate)
TILE_BYTES = 40 << 20  # of scores and candidates while pairs are scored
_WAITING_BATCHES = 6  # that a worker has read ahead, and the one at work
_RAY_START = 12.0  # seconds of processor time until a local Ray runs
_JOB_START = 60.0  # seconds of a job on a cluster, without its nodes' own start


@dataclass(frozen=True)
class Step:
    """A step of the way.

    Attributes:
        name: Of the command, and of the part where it is one.
        seconds: On the clock, where nothing else runs on the machines.
        worker_bytes, gpu_bytes: Memory of its largest worker: of the machine, and of its GPU.
        machine_bytes: Of all that runs at once, Ray too; None where nobody has added it up.
        at_once: How many works of it run at once.
        node: Where they run.
        about: What it is made of.
    """

    name: str
    seconds: float
    worker_bytes: int
    machine_bytes: int | None
    at_once: int = 1
    gpu_bytes: int = 0
    node: str = ""
    about: str = ""


@dataclass(frozen=True)
class Problem:
    """What does not fit, and the key to set."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


Found = tuple[list[Step], list[Problem]]


@dataclass(frozen=True)
class Frame:
    """What all steps are worked out from."""

    config: ExperimentConfig
    costs: SystemCosts
    counts: Counts
    machines: Machines

    @property
    def is_local(self) -> bool:
        return not self.machines.stated

    def work(self, name: str, cost: Cost, node: Node, cpu: float, gpu: float, held: int) -> Work:
        """One worker or trial, from its start.

        Args:
            held: Bytes beside those of a worker that has nothing to do; on a GPU they are there.
        """
        threads, on_gpu = threads_of(cpu), gpu > 0
        seconds = node.seconds(cost, on_gpu=on_gpu, threads=threads) + STARTS * self.machines.start
        memory = self.machines.worker + (CUDA_HOST_BYTES if on_gpu else held)
        return Work(name, seconds, 1 if on_gpu else threads, cpu, gpu, memory)

    def outcome(self, works: Sequence[Work]) -> Outcome:
        """Works side by side on all nodes."""
        nodes = self.machines.nodes
        return side_by_side(works, sum(n.cpus * n.count for n in nodes), sum(n.gpus * n.count for n in nodes))

    def whole(self, step: str, outcome: Outcome, largest: int, node: Node, about: str, remedy: str) -> Found:
        """A command with all its works: with Ray and its driver."""
        all_bytes = outcome.memory + self.machines.worker + RAY_BYTES if self.is_local else None
        start = _RAY_START / node.cpus + self.machines.start if self.is_local else _JOB_START
        found = Step(step, outcome.seconds + start, largest, all_bytes, outcome.at_once, 0, node.name, about)
        wanted = largest if all_bytes is None else all_bytes
        if node.memory is None or wanted <= node.memory:
            return [found], []
        what = f"{step} needs {mebibytes(wanted)} of memory at once, {mebibytes(node.memory)} are free on {node.name}"
        return [found], [Problem(what, remedy)]

    def card(self, name: str, held: int, share: float, node: Node, key: str) -> tuple[int, list[Problem]]:
        """Bytes of a worker on its GPU, and whether they have room in its share of one."""
        if not share:
            return 0, []
        wanted = CUDA_BYTES + held
        if node.gpu_memory is None or wanted <= node.gpu_memory * min(share, 1.0):
            return wanted, []
        now = self.config.train_of(name).micro_batch_size if name in self.costs.parts else None
        smaller = max((now or self.config.train.batch_size) // 2, 1)
        there = mebibytes(int(node.gpu_memory * min(share, 1.0)))
        what = f"{name} needs {mebibytes(wanted)} of GPU memory, its share of {node.name}'s is {there}"
        return wanted, [Problem(what, f"set {key}.resources.gpu higher, or train.micro_batch_size to {smaller}")]

    def held_by(self, part: PartCosts) -> int:
        """Bytes that a part's training takes in its worker, beside the worker itself."""
        counts, train = self.counts, self.config.train_of(part.name)
        size = part.num_bytes.while_training + (part.step.num_bytes or 0 if part.step else 0)
        if part.prepared:
            size += part.prepared["entities"].of(*counts.items("kb"))
            size += part.prepared["mentions"].of(*counts.items("validation"))
        if part.encoder is not None:
            columns = train.batch_size * (2 + train.hard_negatives) + 2 * train.self_mentions + train.extra_negatives
            image = part.encoder.image_bytes
            size += _WAITING_BATCHES * columns * image if part.kind == "towers" else 0
            size += min((counts.entities + counts.mentions["train"]) * image, DECODED_BYTES)
        return size + TILE_BYTES

    def training(self, part: PartCosts) -> Cost:
        """Stage one of a part."""
        return amounts.training(self.config, part, self.costs, self.counts)


def no_node(name: str, cpu: float, gpu: float, key: str) -> Problem:
    """A worker that no node has room for."""
    asked = f"{cpu:g} CPU" + (f" and {gpu:g} GPU" if gpu else "")
    remedy = f"set {key}.cpu and {key}.gpu to what there is"
    return Problem(f"{name} asks for {asked} a worker, which no node has", remedy)


def mebibytes(size: int) -> str:
    """As `1,234 MiB`, or in GiB from ten of them on."""
    return f"{size / 2**30:,.1f} GiB" if size >= 10 << 30 else f"{size / 2**20:,.0f} MiB"
