"""Coats of arms: what a shield shows, its seven elements, and which of them a damaged image hides."""

from dataclasses import astuple, dataclass
from random import Random
from typing import Final, Literal, TypeAlias

Colour: TypeAlias = tuple[int, int, int]
Damage: TypeAlias = Literal["none", "charges", "border"]

TINCTURES: Final[dict[str, Colour]] = {
    "red": (208, 28, 38),
    "blue": (28, 68, 200),
    "green": (22, 138, 56),
    "black": (24, 24, 26),
    "purple": (132, 40, 164),
    "gold": (246, 202, 28),
    "white": (246, 246, 244),
    "cyan": (92, 208, 236),
}
DAMAGES: Final[tuple[Damage, ...]] = ("none", "charges", "border")
PATTERNS: Final = ("plain", "pale", "fess", "bend", "quarterly", "barry", "chevron", "cross")
CHARGES: Final = (
    "ball",
    "ring",
    "star",
    "crescent",
    "diamond",
    "heart",
    "tower",
    "tree",
    "bird",
    "sword",
    "crown",
    "cup",
)
COUNTS: Final = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Arms:
    """A shield: seven elements.

    Attributes:
        pattern: How the field is divided.
        field: Its tincture.
        second: Its second tincture; "" on a plain field.
        charge: What is on the field.
        charge_colour: Its tincture.
        count: How often it is there.
        border: Tincture of the border; "" without one.
    """

    pattern: str
    field: str
    second: str
    charge: str
    charge_colour: str
    count: int
    border: str


# Positions in Arms that a damaged image does not show.
_HIDDEN: Final[dict[Damage, frozenset[int]]] = {
    "none": frozenset(),
    "charges": frozenset({3, 4}),
    "border": frozenset({6}),
}


def visible(arms: Arms, damage: Damage) -> tuple[str | int, ...]:
    """The elements of a shield that an image with this damage shows."""
    hidden = _HIDDEN[damage]
    return tuple(element for position, element in enumerate(astuple(arms)) if position not in hidden)


def draw_arms(rng: Random) -> Arms:
    """Draws a shield: the charge stands out from both tinctures of the field, the border from the field."""
    pattern = rng.choice(PATTERNS)
    field, second, charge_colour = rng.sample(list(TINCTURES), 3)
    if pattern == "plain":
        second = ""
    border = ""
    if rng.random() < 0.5:
        border = rng.choice([colour for colour in TINCTURES if colour not in (field, second)])
    return Arms(pattern, field, second, rng.choice(CHARGES), charge_colour, rng.choice(COUNTS), border)
