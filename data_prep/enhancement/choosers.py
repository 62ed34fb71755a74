"""Choosers: which candidate's description a mention gets, by its sentence. No gold is among what they are given."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from data_prep.enhancement.bm25 import Bm25
from data_prep.enhancement.candidates import Candidate
from data_prep.enhancement.descriptions import words_of


@dataclass(frozen=True, slots=True)
class Question:
    """A mention without its gold, and its candidates, the best names first."""

    mention_id: str
    word: str
    sentence: str
    candidates: Sequence[Candidate]


Chooser = Callable[[Sequence[Question]], Iterable[int | None]]
"""Gives the number of a candidate for each question, or None: none of them."""


def lexical(bm25: Bm25) -> Chooser:
    """Takes the candidate whose text has most of the sentence by BM25, of equals the one with the best name."""

    def choose(questions: Sequence[Question]) -> Iterable[int | None]:
        for question in questions:
            query = frozenset(words_of(question.sentence))
            scores = [bm25.score(query, words_of(each.description.text)) for each in question.candidates]
            yield scores.index(max(scores)) if scores else None

    return choose
