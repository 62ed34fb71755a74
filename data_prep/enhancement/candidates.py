"""Candidates by name: for each mention's word the descriptions whose name it may be, from one pass over a table."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.enhancement.descriptions import Description, words_of

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A description that may be meant.

    Attributes:
        description: It.
        exact: Whether its name, or an alias, is the mention's word and no more.
    """

    description: Description
    exact: bool


class NameIndex:
    """Collects candidates of given words; memory holds `limit` descriptions a word, whatever the table's size.

    A description is a candidate of a word when its name or an alias has all parts of the word. Equal names come first,
    then shorter ones, then the table's order.
    """

    def __init__(self, words: Iterable[str], limit: int) -> None:
        """
        Args:
            words: Of mentions.
            limit: How many candidates a word has at most.
        """
        self._limit, self._count = limit, 0
        self._found: dict[Words, list[tuple[int, int, int, Description]]] = {}
        self._with_part: dict[str, list[Words]] = {}
        for parts in map(words_of, words):
            if parts and parts not in self._found:
                self._found[parts] = []
                self._with_part.setdefault(max(parts, key=len), []).append(parts)

    def add(self, description: Description) -> None:
        """Takes the next description of the table."""
        self._count += 1
        best: dict[Words, tuple[int, int]] = {}
        for name in (description.name, *description.aliases):
            parts = words_of(name)
            present = set(parts)
            for part in present & self._with_part.keys():
                for word in self._with_part[part]:
                    if present.issuperset(word):
                        rank = (int(parts != word), len(parts))
                        best[word] = min(best.get(word, rank), rank)
        for word, (inexact, length) in best.items():
            # A heap of the worst: its first one makes room for a better one.
            entry = (-inexact, -length, -self._count, description)
            heap = self._found[word]
            if len(heap) < self._limit:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)

    def of(self, word: str) -> list[Candidate]:
        """The candidates of a mention's word, the best names first; a text that comes twice counts once."""
        found: dict[str, Candidate] = {}
        for inexact, _, _, description in sorted(self._found.get(words_of(word), []), reverse=True):
            found.setdefault(description.text, Candidate(description, exact=not inexact))
        return list(found.values())
