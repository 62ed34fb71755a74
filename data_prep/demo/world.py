"""Houses of the demo's world (its entities) and what is evidence for them.

Houses come in families that share a name. In a family two houses are twins: their shields differ in one element only
(the charge or the border). Each twin shares two facts with one other house of the family; all other facts of a family
are different. All shields of the world but twins differ in at least two elements. So a name, a fact and a shield each
narrow the choice, and which of them is enough depends on what a mention tells and shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from operator import eq
from random import Random
from typing import Final

from data_prep.demo.arms import CHARGES, DAMAGES, TINCTURES, Arms, Damage, draw_arms, visible
from data_prep.demo.text import FACTS, FIRST_WORDS, GENERIC_WORDS, POINTING_WORDS, SECOND_WORDS, name_words

_FAMILY_SIZES: Final = (3, 4, 5, 6)
_FAMILY_WEIGHTS: Final = (1, 3, 3, 1)
MAX_HOUSES: Final = 3 * len(FIRST_WORDS) * len(SECOND_WORDS)


@dataclass(frozen=True, slots=True)
class House:
    """An entity.

    Attributes:
        name: Its name, which its family shares.
        facts: Its facts.
        arms: Its shield.
        has_image: Whether it has an image.
        twin: Row of the house whose shield is the same but for what `twin_damage` hides, if there is one.
        twin_damage: What hides the difference.
    """

    name: str
    facts: Mapping[str, str]
    arms: Arms
    has_image: bool
    twin: int | None = None
    twin_damage: Damage = "none"


def make_houses(num_houses: int, without_image: float, rng: Random) -> list[House]:
    """Draws houses in random order.

    Args:
        num_houses: From 10 to MAX_HOUSES.
        without_image: The share without an image.
        rng: Draws all.
    """
    names = [f"{first} {second}" for first in FIRST_WORDS for second in SECOND_WORDS]
    rng.shuffle(names)
    used = _UsedArms()
    houses: list[House] = []
    for name, size in zip(names, _family_sizes(num_houses, rng), strict=False):
        twin_damage: Damage = rng.choice(("charges", "border"))
        shields = [*used.draw_twins(twin_damage, rng), *(used.draw(rng) for _ in range(size - 2))]
        base = len(houses)
        for index, (arms, facts) in enumerate(zip(shields, _family_facts(size, rng), strict=True)):
            house = House(name, facts, arms, has_image=True)
            if index < 2:
                house = replace(house, twin=base + 1 - index, twin_damage=twin_damage)
            houses.append(house)
    for row in rng.sample(range(num_houses), round(without_image * num_houses)):
        houses[row] = replace(houses[row], has_image=False)
    return _shuffled(houses, rng)


def _family_sizes(num_houses: int, rng: Random) -> list[int]:
    """Sizes of at least 3 that add up to the number of houses."""
    sizes = []
    left = num_houses
    while left:
        size = rng.choices(_FAMILY_SIZES, _FAMILY_WEIGHTS)[0]
        size = left if left - size < 3 else size
        sizes.append(size)
        left -= size
    return sizes


def _family_facts(size: int, rng: Random) -> list[dict[str, str]]:
    """Facts of namesakes: all different, then one house takes two from the first twin and one two from the second."""
    columns = {fact: rng.sample(values, size) for fact, values in FACTS.items()}
    shared = rng.sample(list(FACTS), 4)
    for fact in shared[:2]:
        columns[fact][2] = columns[fact][0]
    for fact in shared[2:]:
        columns[fact][min(3, size - 1)] = columns[fact][1]
    return [{fact: column[index] for fact, column in columns.items()} for index in range(size)]


def _shuffled(houses: Sequence[House], rng: Random) -> list[House]:
    order = rng.sample(range(len(houses)), len(houses))
    new_row = {old: new for new, old in enumerate(order)}
    return [
        house if house.twin is None else replace(house, twin=new_row[house.twin])
        for house in (houses[old] for old in order)
    ]


class _UsedArms:
    """Shields already given: `draw` keeps every new one at least two elements away from all others."""

    def __init__(self) -> None:
        self._masked: set[tuple[object, ...]] = set()

    def draw(self, rng: Random) -> Arms:
        """A new shield."""
        while True:
            arms = draw_arms(rng)
            if not any(key in self._masked for key in _masked(arms)):
                self._masked.update(_masked(arms))
                return arms

    def draw_twins(self, damage: Damage, rng: Random) -> tuple[Arms, Arms]:
        """Two shields that differ in one element that `damage` hides, and from all others in at least two."""
        while True:
            arms = self.draw(rng)
            if damage == "charges":
                twins = [replace(arms, charge=charge) for charge in CHARGES if charge != arms.charge]
            else:
                taken = (arms.field, arms.second, arms.border)
                twins = [replace(arms, border=colour) for colour in TINCTURES if colour not in taken]
            rng.shuffle(twins)
            own = set(_masked(arms))
            for twin in twins:
                if all(key in own or key not in self._masked for key in _masked(twin)):
                    self._masked.update(_masked(twin))
                    return arms, twin


def _masked(arms: Arms) -> list[tuple[object, ...]]:
    """Seven keys, each with one element left out: two shields share a key when they differ in one element or none."""
    elements = astuple(arms)
    return [(position, *elements[:position], *elements[position + 1 :]) for position in range(len(elements))]


class Evidence:
    """Which houses agree with a word, with facts, with an image: rows of the world.

    Args:
        houses: The world.
    """

    def __init__(self, houses: Sequence[House]) -> None:
        self.houses = houses
        self._everyone = range(len(houses))
        self._visible = {damage: [visible(house.arms, damage) for house in houses] for damage in DAMAGES}
        self._by_word: dict[str, list[int]] = {}
        for row, house in enumerate(houses):
            for word in (house.name, *name_words(house.name)):
                self._by_word.setdefault(word, []).append(row)

    def named(self, word: str) -> Sequence[int]:
        """Houses that the word may mean: by name, by one word of the name, or any for a generic or pointing word."""
        if word in GENERIC_WORDS or word in POINTING_WORDS:
            return self._everyone
        return self._by_word[word]

    def with_facts(self, word: str, facts: Mapping[str, str]) -> list[int]:
        """Houses that agree with the word and all the facts."""
        return [
            row
            for row in self.named(word)
            if all(self.houses[row].facts[fact] == value for fact, value in facts.items())
        ]

    def with_image(self, word: str, row: int, damage: Damage, spared: int = 0) -> list[int]:
        """Houses that agree with the word and, but for `spared` elements, with an image of house `row`."""
        looks = self._visible[damage]
        shield = looks[row]
        agree = len(shield) - spared
        return [other for other in self.named(word) if sum(map(eq, looks[other], shield)) >= agree]
