"""Groups of mentions that are not independent: they share a sentence, a picture or a gold, directly or by others."""

from collections.abc import Hashable, Sequence
from hashlib import sha256

from dsmip.data.records import Mention


def mention_keys(mention: Mention) -> tuple[Hashable, ...]:
    """By what a mention may be linked to others: its sentence, its picture's content, its gold; None: by nothing."""
    picture = None if mention.image is None else sha256(mention.image).digest()
    return mention.sentence.strip() or None, picture, mention.entity_id


def linked_groups(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """The group of each item, from 0 in order of appearance: items that share a key of one kind are in one group.

    Args:
        keys: Of each item, one of each kind; None links to nothing.

    >>> linked_groups([("a", 1), ("b", 1), ("b", None), ("c", None)])
    [0, 0, 0, 1]
    """
    parents = list(range(len(keys)))

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    first_with: dict[tuple[int, Hashable], int] = {}
    for item, of_item in enumerate(keys):
        for kind, key in enumerate(of_item):
            if key is not None:
                parents[root(item)] = root(first_with.setdefault((kind, key), item))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(item), len(numbers)) for item in range(len(keys))]
