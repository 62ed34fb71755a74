"""BM25 (Robertson and Zaragoza, 2009) with statistics of a table that is read once and not kept."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

K1, B = 1.2, 0.75


class Bm25:
    """Scores of documents for queries. Of the documents it keeps how many have a word, for words of queries alone."""

    def __init__(self, vocabulary: Collection[str]) -> None:
        """
        Args:
            vocabulary: The words that queries may have; others count nothing.
        """
        self._vocabulary = frozenset(vocabulary)
        self._documents: Counter[str] = Counter()
        self._count = self._length = 0

    def add(self, document: Sequence[str]) -> None:
        """Takes the words of the next document into the statistics."""
        self._count += 1
        self._length += len(document)
        self._documents.update(self._vocabulary.intersection(document))

    def score(self, query: Collection[str], document: Sequence[str]) -> float:
        """The sum over the query's different words of idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean)).

        idf is log(1 + (N - n + 1/2) / (n + 1/2)) with n of N documents that have the word.
        """
        if not document:
            return 0.0
        frequency = Counter(document)
        norm = K1 * (1 - B + B * len(document) * self._count / self._length) if self._length else K1
        return math.fsum(
            self._idf(word) * frequency[word] * (K1 + 1) / (frequency[word] + norm)
            for word in set(query)
            if frequency[word]
        )

    def _idf(self, word: str) -> float:
        having = self._documents[word]
        return math.log1p((self._count - having + 0.5) / (having + 0.5))
