"""Splits that share no sentence and no picture, for releases that come without splits.

Records that have a sentence or a picture in common, directly or through other records, form a group, and a group lands
in one split whole. (In the circulated WikiMEL split, test mentions stand in captions that training has seen.)
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsmip.errors import UserError
from dsmip.manifest import SPLITS
from dsmip.sampler import permutation


@dataclass(frozen=True, slots=True)
class SplitItem:
    """A record to be placed. picture: what tells its file from others, None: none. size: its mentions, at least 1."""

    sentence: str
    picture: str | None
    size: int


def check_percentages(percentages: tuple[int, int, int]) -> None:
    """Raises UserError unless they are shares of a whole, some of it for training."""
    if sum(percentages) != 100 or min(percentages) < 0 or percentages[0] == 0:
        shown = "/".join(map(str, percentages))
        raise UserError(f"--split {shown}: takes percentages of train/validation/test that sum to 100, as 70/10/20")


def grouped_split(items: Iterable[SplitItem], percentages: tuple[int, int, int], seed: int) -> list[str]:
    """The split of each item; depends on the items, their order and the seed alone. Only hashes are kept of the items.

    Sentences are equal here when they differ only in case, width and white space; empty ones join nothing. Large groups
    are placed first, equal ones in the seed's order, each where most mentions are wanting: no split exceeds its share
    of the mentions by as much as the largest group.
    """
    roots, sizes = _groups(items)
    group_sizes = dict.fromkeys(roots, 0)
    for root, size in zip(roots, sizes, strict=True):
        group_sizes[root] += size
    groups = list(group_sizes)
    order = [groups[place] for place in permutation(len(groups), "grouped split", seed).tolist()]
    split_of = {}
    wanting = [sum(sizes) * percentage for percentage in percentages]  # hundredths of mentions
    for root in sorted(order, key=group_sizes.__getitem__, reverse=True):
        chosen = wanting.index(max(wanting))
        wanting[chosen] -= 100 * group_sizes[root]
        split_of[root] = SPLITS[chosen]
    return [split_of[root] for root in roots]


def _groups(items: Iterable[SplitItem]) -> tuple[list[int], list[int]]:
    """The first item of each item's group, and each item's size."""
    parent: list[int] = []
    sizes: list[int] = []
    first_with: dict[bytes, int] = {}
    for position, item in enumerate(items):
        parent.append(position)
        sizes.append(item.size)
        for key in _keys(item):
            one, other = _root(parent, position), _root(parent, first_with.setdefault(key, position))
            parent[max(one, other)] = min(one, other)
    return [_root(parent, position) for position in range(len(parent))], sizes


def _root(parent: list[int], position: int) -> int:
    while parent[position] != position:
        parent[position] = parent[parent[position]]
        position = parent[position]
    return position


def _keys(item: SplitItem) -> Iterator[bytes]:
    sentence = " ".join(unicodedata.normalize("NFKC", item.sentence).casefold().split())
    if sentence:
        yield _digest("sentence", sentence)
    if item.picture is not None:
        yield _digest("picture", item.picture)


def _digest(*parts: str) -> bytes:
    # Surrogates: broken texts come this far, too.
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
