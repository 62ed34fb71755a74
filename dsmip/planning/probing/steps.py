"""The probe of a training step: batches that a machine can try in seconds, and what the whole batch then takes.

What a step takes has a fixed part (the optimizer, all parameters' gradients, a batch's columns) and one that grows with
the batch. Where the whole batch would take too long, two smaller ones tell both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dsmip.config import TrainConfig
from dsmip.planning.probing.measure import measured
from dsmip.planning.probing.probe import Cost, Meter
from dsmip.training.local_context import LocalContext
from dsmip.training.loop import Loop, LoopState, Objective, StepSource
from dsmip.training.optimizer import build_optimizer

_STEPS = 2
_LEAST_GROWTH = 0.1  # of what the larger probe takes a mention: less is noise


@dataclass(frozen=True)
class Stepped:
    """What a training step costs.

    Attributes:
        cost: Of a whole batch, read and trained on.
        num_bytes: Memory that it takes beside the part and what its training keeps; None: nobody tells.
    """

    cost: Cost
    num_bytes: int | None


class _Quiet(LocalContext):
    """A training that nobody watches and nothing is saved of."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Path(), device)

    def restore(self) -> None:
        return None


class _Given(StepSource):
    """Batches that are there already."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self._steps = steps

    def num_steps(self) -> int:
        return len(self._steps)

    def steps(self, epoch: int, start: int = 0) -> Iterator[Any]:
        return iter(self._steps)


@dataclass(frozen=True)
class Trained:
    """What is trained in a probe.

    Attributes:
        towers: Names of the module's pretrained tensors.
    """

    objective: Objective
    source: StepSource
    config: TrainConfig
    towers: set[str]


def whole_step(probe: Callable[[int], Trained], few: int, batch_size: int, meter: Meter, held: int = 0) -> Stepped:
    """What a step of a whole batch takes, from one of `few` mentions and, unless these are all, one of half of them.

    Args:
        probe: Makes a training of batches of so many mentions.
        held: So many mentions' tensors are in memory at a time (0: the batch's).
    """
    if few >= batch_size:
        return stepped(probe(batch_size), meter)
    half = max(few // 2, 1)
    small, large = stepped(probe(half), meter), stepped(probe(few), meter)
    if half == few:
        small = Stepped(Cost(), 0)

    def extended(of_half: float, of_few: float, to: int) -> float:
        growth = max((of_few - of_half) / max(few - half, 1), _LEAST_GROWTH * of_few / few)
        return of_few + growth * (to - few)

    costs = [
        extended(getattr(small.cost, name), getattr(large.cost, name), batch_size)
        for name in ("seconds", "flops", "reading")
    ]
    num_bytes = None
    if small.num_bytes is not None and large.num_bytes is not None:
        num_bytes = int(extended(small.num_bytes, large.num_bytes, max(min(held or batch_size, batch_size), few)))
    return Stepped(Cost(*costs), num_bytes)


def stepped(trained: Trained, meter: Meter) -> Stepped:
    """Trains some steps, and measures the last one."""
    config = trained.config
    gentle = config.model_copy(update={"learning_rate": 1e-9, "tower_learning_rate": None})  # weights are random
    module = trained.objective.module.to(meter.device)
    loop = Loop(
        trained.objective,
        build_optimizer(module, gentle, trained.towers),
        lambda step: 1.0,
        _Quiet(meter.device),
        seed=0,
        precision=config.precision,
        clip_norm=config.clip_norm,
    )
    count = min(_STEPS, trained.source.num_steps())
    steps, read = measured(lambda: list(islice(trained.source.steps(0), count)), torch.device("cpu"))
    loop.epoch(_Given(steps[:1]), LoopState())
    few = steps[-1:]
    _, cost = measured(lambda: loop.epoch(_Given(few), LoopState(epoch=1)), meter.device)
    flops = meter.flops(lambda: loop.epoch(_Given(few), LoopState(epoch=2))) if meter.counts else 0.0
    reading = read.cpu_s / count
    return Stepped(Cost(cost.seconds(meter.device) + reading, flops, reading), cost.peak_bytes)
