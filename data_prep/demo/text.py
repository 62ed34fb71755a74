"""Texts of the demo's world: names, facts, blazons and the sentences that all kinds of mentions share.

Every template takes the word and three facts, told or left vague. A template gives nothing away by itself: what differs
between kinds is how many facts are told and whether they are true of the answer.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Final

from data_prep.demo.arms import Arms


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A name is one of the first words and one of the second: 640 names of two common words.
FIRST_WORDS: Final = _words(
    "oak ash elm thorn rose fern wolf fox bear hawk lion swan raven stag hare winter summer autumn spring north south"
    " east west king queen bishop monk miller hunter shepherd duke abbot"
)
SECOND_WORDS: Final = _words(
    "hill ford bridge field wood gate mill haven brook hall park well church castle market dale cliff bank rock garden"
)
FACTS: Final[dict[str, tuple[str, ...]]] = {
    "seat": _words(
        "coast moor valley marsh forest island desert prairie delta ridge canyon meadow harbor lake glacier jungle"
    ),
    "founder": _words(
        "arthur edward henry oliver martin thomas robert william george simon peter philip alice helen emma clara"
    ),
    "trade": _words(
        "wool salt silk glass wine timber honey paper leather wheat copper spices pottery candles cheese coal"
    ),
    "fair": _words("january february april june july august september october november december"),
}
GENERIC_WORDS: Final = ("the house", "the town", "the family", "the place")
POINTING_WORDS: Final = ("this shield", "these arms", "this badge", "this banner")

_STATED: Final = {
    "seat": "by the {}",
    "founder": "founded by {}",
    "trade": "dealing in {}",
    "fair": "with a fair in {}",
}
_VAGUE: Final = {
    "seat": ("off the road", "in a quiet part", "far from here"),
    "founder": ("founded long ago", "founded in older days", "founded by someone"),
    "trade": ("dealing in goods", "dealing in this and that", "dealing in little"),
    "fair": ("with a fair sometimes", "with a fair each year", "with a fair now and then"),
}
_TEMPLATES: Final = (
    "travellers speak of {word}, {one}, {two}, {three}.",
    "the records of {word}, {one} and {two}, are kept, {three}.",
    "{one}, {two}, {word} is known to many, {three}.",
    "we came to see {word}, {one}, {two} and {three}.",
    "a letter about {word}: {one}, {two}, {three}.",
    "old songs praise {word}, {one}, and tell of it {two}, {three}.",
    "{one} and {two}, so they describe {word}, {three}.",
    "a painter drew {word}, {one}, {two} and {three}.",
    "on the map we find {word}, {one}, {two}, {three}.",
    "my uncle wrote of {word}, {one}, {two}, {three}.",
)


def name_words(name: str) -> tuple[str, str]:
    """The two words of a name."""
    first, second = name.split()
    return first, second


def blazon(arms: Arms) -> str:
    """The shield in words: 'quarterly blue and gold, three white star, border red'."""
    field = f"plain {arms.field}" if not arms.second else f"{arms.pattern} {arms.field} and {arms.second}"
    number = ("one", "two", "three")[arms.count - 1]
    border = f", border {arms.border}" if arms.border else ""
    return f"{field}, {number} {arms.charge_colour} {arms.charge}{border}"


def attributes(arms: Arms, facts: Mapping[str, str]) -> str:
    """The attribute text of a knowledge-base record."""
    stated = " ".join(f"{fact.capitalize()}: {facts[fact]}." for fact in FACTS)
    return f"Arms: {blazon(arms)}. {stated}"


def sentence(word: str, slots: Sequence[tuple[str, str | None]], rng: Random) -> str:
    """A sentence from a random template.

    Args:
        word: The mention's word.
        slots: Three facts, each with its value or None for a vague phrase.
        rng: Draws the template and the vague phrases.
    """
    one, two, three = (
        rng.choice(_VAGUE[fact]) if value is None else _STATED[fact].format(value) for fact, value in slots
    )
    return rng.choice(_TEMPLATES).format(word=word, one=one, two=two, three=three)
