"""Mentions of the demo's world: what each one says and shows, by kind.

Kinds share words, templates, damages and drawing style. They differ in what the evidence says about the answer:

| kind | word + facts | word + image |
|---|---|---|
| easy | only the answer | only the answer |
| text | only the answer | the image is of another house: misleading |
| missing_picture | only the answer | no image |
| picture | vague: several houses | only the answer, by two elements at least |
| pointing | "this shield": the facts are of another house: misleading | only the answer, by two elements at least |
| both | two or more houses | two or more houses; only the answer agrees with word, facts and image |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeAlias, get_args

from data_prep.demo.arms import DAMAGES, Damage
from data_prep.demo.text import FACTS, GENERIC_WORDS, POINTING_WORDS, name_words, sentence
from data_prep.demo.world import Evidence
from dsmip.errors import UserError

Kind: TypeAlias = Literal["easy", "text", "missing_picture", "picture", "pointing", "both"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_WordForm: TypeAlias = Literal["name", "short", "generic", "pointing"]
_WORD_FORMS: Final[tuple[_WordForm, ...]] = get_args(_WordForm)
_WORD_WEIGHTS: Final[dict[Kind, tuple[float, ...]]] = {
    "easy": (0.6, 0.15, 0.15, 0.1),
    "text": (0.7, 0.15, 0.15, 0.0),
    "missing_picture": (0.7, 0.15, 0.15, 0.0),
    "picture": (0.5, 0.15, 0.15, 0.2),
    "pointing": (0.0, 0.0, 0.0, 1.0),
    "both": (0.8, 0.2, 0.0, 0.0),
}
_NUM_SLOTS: Final = 3
_TRIES: Final = 1000


@dataclass(frozen=True, slots=True)
class MentionPlan:
    """A mention before its image is drawn; houses are rows of the world.

    Attributes:
        kind: Its kind.
        gold: The answer.
        word: Its word.
        facts: The facts that the sentence tells.
        sentence: Its sentence.
        shown: The house in the image; None: there is no image.
        damage: What the image does not show.
    """

    kind: Kind
    gold: int
    word: str
    facts: dict[str, str]
    sentence: str
    shown: int | None
    damage: Damage


@dataclass(frozen=True, slots=True)
class MentionRates:
    """Shares in 0..1.

    Attributes:
        damaged: Of the images, damaged where the kind leaves it open.
        namesakes: Of the misleading images, of a house of the same name.
    """

    damaged: float
    namesakes: float


class MentionDrawer:
    """Draws plans whose evidence is exactly what their kind promises.

    Args:
        evidence: The world.
        rates: What the kinds leave open.
    """

    def __init__(self, evidence: Evidence, rates: MentionRates) -> None:
        self._evidence = evidence
        self._houses = evidence.houses
        self._rates = rates

    def eligible(self, kind: Kind, pool: Sequence[int]) -> list[int]:
        """Houses of a pool that may be the answer of a kind (of `both` not all can: others are drawn instead)."""
        if kind in ("text", "missing_picture"):
            return list(pool)
        with_image = [row for row in pool if self._houses[row].has_image]
        if kind == "both":
            twins = {row: self._houses[row].twin for row in with_image}
            return [row for row, twin in twins.items() if twin is not None and self._houses[twin].has_image]
        if kind == "easy":
            return with_image
        return [row for row in with_image if self._houses[row].twin is None]

    def draw(self, kind: Kind, golds: Sequence[int], rng: Random) -> MentionPlan:
        """A plan with an answer out of `golds`.

        Raises:
            UserError: The world is too small for the kind.
        """
        for _ in range(_TRIES if golds else 0):
            gold = rng.choice(golds)
            word = self._word(gold, rng.choices(_WORD_FORMS, _WORD_WEIGHTS[kind])[0], rng)
            facts = self._facts(kind, gold, rng)
            shown, damage = self._shown(kind, gold, rng)
            if self._keeps_promise(kind, gold, word, facts, shown, damage):
                return MentionPlan(kind, gold, word, facts, _sentence(word, facts, rng), shown, damage)
        raise UserError(f"the demo world is too small for mentions of kind '{kind}': raise num_entities")

    def _word(self, gold: int, form: _WordForm, rng: Random) -> str:
        name = self._houses[gold].name
        if form == "name":
            return name
        return rng.choice({"short": name_words(name), "generic": GENERIC_WORDS, "pointing": POINTING_WORDS}[form])

    def _facts(self, kind: Kind, gold: int, rng: Random) -> dict[str, str]:
        """The facts that the sentence tells."""
        if kind == "picture":
            return {}
        chosen = rng.sample(list(FACTS), rng.choice((1, 2)) if kind == "both" else rng.choice((2, 3)))
        source = rng.randrange(len(self._houses)) if kind == "pointing" else gold
        return {fact: self._houses[source].facts[fact] for fact in chosen}

    def _shown(self, kind: Kind, gold: int, rng: Random) -> tuple[int | None, Damage]:
        """The house in the image and the damage."""
        if kind == "missing_picture":
            return None, "none"
        if kind == "both":
            return gold, self._houses[gold].twin_damage
        damage: Damage = rng.choice(DAMAGES[1:]) if rng.random() < self._rates.damaged else "none"
        if kind != "text":
            return gold, damage
        namesakes = rng.random() < self._rates.namesakes
        others = self._evidence.named(self._houses[gold].name) if namesakes else range(len(self._houses))
        return rng.choice([row for row in others if row != gold]), damage

    def _keeps_promise(
        self, kind: Kind, gold: int, word: str, facts: dict[str, str], shown: int | None, damage: Damage
    ) -> bool:
        by_text = self._evidence.with_facts(word, facts)
        if kind in ("easy", "text", "missing_picture") and by_text != [gold]:
            return False
        if shown is None:
            return True
        if kind == "text":
            by_image = self._evidence.with_image(word, shown, damage, spared=1)
            return self._houses[shown].has_image and gold not in by_image
        by_image = self._evidence.with_image(word, shown, damage)
        if kind == "easy":
            return by_image == [gold]
        if kind == "both":
            return len(by_text) > 1 and len(by_image) > 1 and set(by_text) & set(by_image) == {gold}
        if self._evidence.with_image(word, shown, damage, spared=1) != [gold]:
            return False
        if kind == "picture":
            return len(by_text) > 1
        return all(self._houses[gold].facts[fact] != value for fact, value in facts.items())


def _sentence(word: str, facts: dict[str, str], rng: Random) -> str:
    """A sentence that tells these facts and is vague about others."""
    others = rng.sample([fact for fact in FACTS if fact not in facts], _NUM_SLOTS - len(facts))
    slots = [*facts.items(), *((fact, None) for fact in others)]
    rng.shuffle(slots)
    return sentence(word, slots, rng)
