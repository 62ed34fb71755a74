"""How a training is run: workers, resources, checkpoints, restarts. None of it changes a result but by rounding.

One exception: with `negatives: local` each worker contrasts with its own share of a batch, so their number counts.
"""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PlainSerializer, PlainValidator

from dsmip.frozen import Frozen


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

    workers: a number, or `1..4` for as many as there is room for: it goes on with fewer when a node is lost.
    checkpoint_steps: save after so many steps, besides after each epoch; null: after epochs only.
    restarts: how often it goes on from its checkpoint after workers were lost; machines that are taken away with
    notice do not count.
    stall_minutes: a worker that has made no step for so long writes what it was doing to a file and ends, as if lost.
    """

    workers: WorkersField = Workers(1, 1)
    resources: Resources = Resources()
    checkpoint_steps: int | None = Field(None, ge=1)
    restarts: int = Field(3, ge=0)
    stall_minutes: float = Field(30.0, gt=0)
