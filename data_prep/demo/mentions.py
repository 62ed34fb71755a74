"""The mentions of the demo world: what each one says and shows, by kind.

Kinds share words, templates, damages and drawing style. They differ in what the evidence says about the answer:

| kind | word + facts | word + picture |
|---|---|---|
| easy | only the answer | only the answer |
| text | only the answer | the picture is of another house: misleading |
| missing_picture | only the answer | no picture |
| picture | vague: several houses | only the answer, by two elements at least |
| pointing | "this shield": the facts are of another house: misleading | only the answer, by two elements at least |
| both | two or more houses | two or more houses; only the answer agrees with word, facts and picture |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeAlias, get_args

from data_prep.demo.drawing import DAMAGES, Damage
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
    """A mention before it is drawn: rows are of the world; `shown` is the house in the picture, None without one."""

    kind: Kind
    gold: int
    word: str
    facts: dict[str, str]
    sentence: str
    shown: int | None
    damage: Damage


@dataclass(frozen=True, slots=True)
class MentionRates:
    """Shares in 0..1: pictures damaged where the kind leaves it open; misleading pictures that are of a namesake."""

    damaged: float
    namesakes: float


class MentionDrawer:
    """Draws plans of a kind whose evidence is exactly what the kind promises."""

    def __init__(self, evidence: Evidence, rates: MentionRates) -> None:
        self._evidence = evidence
        self._houses = evidence.houses
        self._rates = rates

    def eligible(self, kind: Kind, pool: Sequence[int]) -> list[int]:
        """The houses of a pool that can be the answer of a kind (for `both`: most of them, the rest is redrawn)."""
        if kind in ("text", "missing_picture"):
            return list(pool)
        pictured = [row for row in pool if self._houses[row].pictured]
        if kind == "both":
            return [
                row for row in pictured if (twin := self._houses[row].twin) is not None and self._houses[twin].pictured
            ]
        if kind == "easy":
            return pictured
        return [row for row in pictured if self._houses[row].twin is None]

    def draw(self, kind: Kind, golds: Sequence[int], rng: Random) -> MentionPlan:
        """One plan with an answer out of `golds`; raises UserError when the world is too small for the kind."""
        for _ in range(_TRIES if golds else 0):
            gold = rng.choice(golds)
            word = self._word(gold, rng.choices(_WORD_FORMS, _WORD_WEIGHTS[kind])[0], rng)
            facts = self._facts(kind, gold, rng)
            shown, damage = self._picture(kind, gold, rng)
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
        told = rng.sample(list(FACTS), rng.choice((1, 2)) if kind == "both" else rng.choice((2, 3)))
        source = rng.randrange(len(self._houses)) if kind == "pointing" else gold
        return {fact: self._houses[source].facts[fact] for fact in told}

    def _picture(self, kind: Kind, gold: int, rng: Random) -> tuple[int | None, Damage]:
        """The house shown and the damage."""
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
        told = self._evidence.told(word, facts)
        if kind in ("easy", "text", "missing_picture") and told != [gold]:
            return False
        if shown is None:
            return True
        if kind == "text":
            return self._houses[shown].pictured and gold not in self._evidence.shown(word, shown, damage, spared=1)
        seen = self._evidence.shown(word, shown, damage)
        if kind == "easy":
            return seen == [gold]
        if kind == "both":
            return len(told) > 1 and len(seen) > 1 and set(told) & set(seen) == {gold}
        if self._evidence.shown(word, shown, damage, spared=1) != [gold]:
            return False
        if kind == "picture":
            return len(told) > 1
        return all(self._houses[gold].facts[fact] != value for fact, value in facts.items())


def _sentence(word: str, facts: dict[str, str], rng: Random) -> str:
    """A sentence that tells these facts and is vague about others."""
    others = rng.sample([fact for fact in FACTS if fact not in facts], _NUM_SLOTS - len(facts))
    slots = [*facts.items(), *((fact, None) for fact in others)]
    rng.shuffle(slots)
    return sentence(word, slots, rng)
