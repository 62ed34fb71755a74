"""Stated rates of cards and machines (`rates.yaml`), for machines that nothing can be measured on."""

import difflib
from functools import cache
from importlib.resources import files

from pydantic import Field

from dsmip.config import Frozen
from dsmip.errors import UserError
from dsmip.planning.machine import Node
from dsmip.storage.parsing import parse_yaml

UNLIMITED = 1_000_000  # nodes of a type without a maximum


class Card(Frozen):
    """A GPU. single, half: TFLOP/s; memory: GB."""

    single: float = Field(gt=0)
    half: float = Field(gt=0)
    memory: float = Field(gt=0)
    source: str


class MachineType(Frozen):
    """A machine. cpu: GFLOP/s of one of its CPUs; memory: GB; gpus: How many cards of a kind it has."""

    cpus: float = Field(gt=0)
    memory: float = Field(gt=0)
    cpu: float = Field(gt=0)
    card: str | None = None
    gpus: int = Field(0, ge=0)
    source: str


class Rates(Frozen):
    """The file. achieved: The share of a rate that is reached."""

    achieved: float = Field(gt=0, le=1)
    cards: dict[str, Card]
    machines: dict[str, MachineType]


@cache
def stated_rates() -> Rates:
    """What the file says."""
    text = files("dsmip.planning").joinpath("rates.yaml").read_text(encoding="utf-8")
    return Rates.model_validate(parse_yaml(text, "rates.yaml"))


def stated_node(
    name: str, machine: str, count: int | None, cpus: float | None, gpus: float | None, *, half: bool
) -> tuple[Node, list[str]]:
    """Nodes of a type, and the sources of what is stated of them.

    Args:
        name: Of the node type.
        machine: Of the machine type.
        count: How many there may be; None: any number.
        cpus, gpus: What Ray is told of them, where it is not all.
        half: Whether trainings compute in half precision.

    Raises:
        UserError: Nothing is stated of such a machine.
    """
    rates = stated_rates()
    if machine not in rates.machines:
        near = difflib.get_close_matches(machine, rates.machines, n=1, cutoff=0.0)
        raise UserError(
            f"node type {name}: no rates are stated of {machine!r} (the nearest is {near[0]}); known are "
            f"{', '.join(rates.machines)}"
        )
    found = rates.machines[machine]
    card = rates.cards[found.card] if found.card else None
    node = Node(
        name,
        UNLIMITED if count is None else count,
        found.cpus if cpus is None else cpus,
        float(found.gpus) if gpus is None else gpus,
        int(found.memory * 1e9),
        int(card.memory * 1e9) if card else None,
        found.cpu * 1e9 * rates.achieved,
        (card.half if half else card.single) * 1e12 * rates.achieved if card else None,
    )
    return node, [found.source, *([card.source] if card else [])]
