"""Works side by side on machines: when all of them have ended, and how many of them run at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf

_SLACK = 1e-6  # fractions of CPUs are floats


@dataclass(frozen=True, slots=True)
class Work:
    """One work, of equal workers.

    Attributes:
        alone: Seconds that it takes when nothing else runs.
        demand: Processors (of its kind: CPUs, or GPUs) that it keeps busy meanwhile.
        cpu, gpu: What it asks for, all workers together.
        memory: Bytes of host memory of all its workers.
    """

    name: str
    alone: float
    demand: float
    cpu: float
    gpu: float = 0.0
    memory: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.gpu > 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How works went.

    Attributes:
        seconds: Until the last one had ended.
        memory: The most that those running at once took.
        at_once: The most of them that ran at once.
    """

    seconds: float
    memory: int
    at_once: int


def side_by_side(works: Sequence[Work], cpus: float, gpus: float = 0.0) -> Outcome:
    """Works in their order, each started as soon as what it asks for is free; busy processors are shared evenly.

    One that asks for more than there is runs alone.
    """
    waiting, running, now = list(works), dict[int, tuple[Work, float]](), 0.0
    most_memory, most = 0, 0
    number = 0
    while waiting or running:
        while waiting and (not running or _fits(waiting[0], [each for each, _ in running.values()], cpus, gpus)):
            work = waiting.pop(0)
            running[number] = work, work.alone
            number += 1
        most = max(most, len(running))
        most_memory = max(most_memory, sum(each.memory for each, _ in running.values()))
        rate = {
            on_gpu: min(1.0, there / busy) if (busy := _demand(running, on_gpu)) else 1.0
            for on_gpu, there in ((False, cpus), (True, gpus or inf))
        }
        span = min(left / rate[work.on_gpu] for work, left in running.values())
        now += span
        ended = {key: (work, left - span * rate[work.on_gpu]) for key, (work, left) in running.items()}
        running = {key: value for key, value in ended.items() if value[1] > _SLACK}
    return Outcome(now, most_memory, most)


def _fits(work: Work, running: Sequence[Work], cpus: float, gpus: float) -> bool:
    cpu = sum(each.cpu for each in running) + work.cpu
    gpu = sum(each.gpu for each in running) + work.gpu
    return cpu <= cpus + _SLACK and gpu <= gpus + _SLACK


def _demand(running: dict[int, tuple[Work, float]], on_gpu: bool) -> float:
    return sum(work.demand for work, _ in running.values() if work.on_gpu == on_gpu)


def rung_sizes(trials: int, rungs: int, reduction: int) -> list[int]:
    """Trials of each rung of successive halving."""
    sizes = [trials]
    while len(sizes) < rungs:
        sizes.append(-(-sizes[-1] // reduction))
    return sizes


def threads_of(cpu: float) -> int:
    """Threads of a worker that asks for so many CPUs (`ray_jobs.cluster.workers.set_threads`)."""
    return max(floor(cpu), 1)
