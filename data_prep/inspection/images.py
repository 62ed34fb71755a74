"""Checks of images: those that splits share, mentions that show their gold, entities that look alike."""

from dataclasses import dataclass

import numpy as np

from data_prep.inspection.checks import NOBODY, Check, groups_of
from data_prep.inspection.columns import Columns, Flags, ImageColumns, Ints, joined
from data_prep.inspection.image_hash import are_near, near_pairs
from dsmip.data.manifest import SPLITS

_NO_OWNER = np.iinfo(np.int64).max


def image_checks(columns: Columns) -> tuple[list[Check], list[Check]]:
    """Checks of images.

    Exact: the same bytes. Near: see `image_hash`; what is exact is near as well. Plain images are near to nothing but
    still exact copies of each other.

    Returns:
        Checks over all mentions, and checks over all entities.
    """
    mine, theirs = columns.mention_images, columns.entity_images
    images = joined([mine, theirs])
    of_entity = np.arange(len(images.owner)) >= len(mine.owner)
    alikes = [_Alike.exact(images), _Alike.near(images)]
    return (
        _shared_by_splits(columns, images.owner, of_entity, alikes)
        + _beside_gold(columns)
        + _of_other_entities(columns, images.owner, of_entity, alikes)
        + _useless(mine, columns.mentions.has_image, "picture"),
        _shared_by_entities(columns, images.owner, of_entity, alikes)
        + _useless(theirs, columns.entities.num_images > 0, "a picture"),
    )


@dataclass(frozen=True, slots=True)
class _Alike:
    """Which images are alike.

    Attributes:
        name: Of the comparison, in names of checks.
        words: Of the comparison, in labels.
        group: Each image's group of copies.
        left: Groups of pairs of alike groups, both ways and each with itself.
        right: The other group of each pair.
    """

    name: str
    words: str
    group: Ints
    left: Ints
    right: Ints

    @classmethod
    def exact(cls, images: ImageColumns) -> "_Alike":
        group = groups_of(images.content)
        selves = np.arange(int(group.max(initial=-1)) + 1)
        return cls("exact", "", group, selves, selves)

    @classmethod
    def near(cls, images: ImageColumns) -> "_Alike":
        bits, colours = images.bits, images.colours
        # what cannot be compared is alike to its exact copies only
        contents = np.where(_comparable(images), 0, images.content)
        keys = np.concatenate([each.view(np.uint8).reshape(-1, 8) for each in (contents, bits)] + [colours], 1)
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        group, comparable = group.reshape(-1), np.flatnonzero(_comparable(images)[first])
        selves = np.arange(len(first))
        pairs = comparable[near_pairs(bits[first[comparable]], colours[first[comparable]])]
        left, right = np.r_[selves, pairs[:, 0], pairs[:, 1]], np.r_[selves, pairs[:, 1], pairs[:, 0]]
        return cls("near", " or nearly", group, left, right)

    def owners(self, owner: Ints, inside: Flags) -> tuple[Ints, Ints]:
        """The lowest and the highest owner of the images inside that are alike to each image, or NOBODY."""
        num_groups = int(self.group.max(initial=-1)) + 1
        low, high = np.full(num_groups, _NO_OWNER), np.full(num_groups, NOBODY)
        np.minimum.at(low, self.group[inside], owner[inside])
        np.maximum.at(high, self.group[inside], owner[inside])
        all_low, all_high = low.copy(), high.copy()
        np.minimum.at(all_low, self.left, low[self.right])
        np.maximum.at(all_high, self.left, high[self.right])
        return np.where(all_high == NOBODY, NOBODY, all_low)[self.group], all_high[self.group]


def _shared_by_splits(columns: Columns, owner: Ints, of_entity: Flags, alikes: list[_Alike]) -> list[Check]:
    mentions, mine = columns.mentions, ~of_entity
    split_P = np.where(mine, mentions.split[np.where(mine, owner, 0)], NOBODY)
    checks = []
    for number, split in enumerate(SPLITS):
        of = mentions.has_image & (mentions.split != number)
        for alike in alikes:
            found, _ = alike.owners(owner, split_P == number)
            partner = _by_owner(owner[mine], found[mine], len(of))
            hits = of & (partner != NOBODY)
            label = f"picture is{alike.words} in {split} too"
            partner = np.where(hits, partner, NOBODY)
            checks.append(Check(f"picture_{alike.name}_in_{split}", label, hits, of, partner))
    return checks


def _of_other_entities(columns: Columns, owner: Ints, of_entity: Flags, alikes: list[_Alike]) -> list[Check]:
    mine, gold_M = ~of_entity, columns.mentions.gold
    gold_P = gold_M[owner[mine]]
    checks = []
    for alike in alikes:
        low, high = (found[mine] for found in alike.owners(owner, of_entity))
        partner = _by_owner(owner[mine], _other(low, high, gold_P), len(gold_M))
        hits, label = partner != NOBODY, f"picture is{alike.words} another entity's"
        of = columns.mentions.has_image
        checks.append(Check(f"picture_{alike.name}_of_another", label, hits, of, partner, "entity"))
    return checks


def _shared_by_entities(columns: Columns, owner: Ints, of_entity: Flags, alikes: list[_Alike]) -> list[Check]:
    num_images = columns.entities.num_images
    checks = []
    for alike in alikes:
        low, high = (found[of_entity] for found in alike.owners(owner, of_entity))
        mine = owner[of_entity]
        partner = _by_owner(mine, _other(low, high, mine), len(num_images))
        hits, label = partner != NOBODY, f"a picture is{alike.words} another entity's too"
        checks.append(Check(f"picture_{alike.name}_shared", label, hits, num_images > 0, partner, "entity"))
    return checks


def _beside_gold(columns: Columns) -> list[Check]:
    """Compares a mention's image with each of its gold's."""
    mine, theirs, gold_M = columns.mention_images, columns.entity_images, columns.mentions.gold
    gold_P = gold_M[mine.owner]
    starts = np.searchsorted(theirs.owner, np.arange(len(columns.entities.name) + 1))
    counts = starts[gold_P + 1] - starts[gold_P]
    left = np.repeat(np.arange(len(gold_P)), counts)
    right = np.arange(len(left)) + np.repeat(starts[gold_P] - np.cumsum(counts) + counts, counts)
    exact = mine.content[left] == theirs.content[right]
    near = are_near(mine.bits[left], mine.colours[left], theirs.bits[right], theirs.colours[right])
    near &= _comparable(mine)[left] & _comparable(theirs)[right]
    of = columns.mentions.has_image & (columns.entities.num_images[gold_M] > 0)
    checks = []
    for name, words, pairs in (("exact", "", exact), ("near", " or nearly", exact | near)):
        hits = np.zeros(len(gold_M), np.bool_)
        hits[mine.owner[left[pairs]]] = True
        checks.append(Check(f"picture_{name}_of_gold", f"picture is{words} one of its gold's", hits, of))
    return checks


def _useless(images: ImageColumns, shown: Flags, subject: str) -> list[Check]:
    checks = []
    for name, words, hits_P in (
        ("plain", "is of one colour", images.plain),
        ("unreadable", "cannot be decoded", ~images.readable),
    ):
        hits = np.zeros(len(shown), np.bool_)
        hits[images.owner[hits_P]] = True
        checks.append(Check(f"picture_{name}", f"{subject} {words}", hits, shown))
    return checks


def _comparable(images: ImageColumns) -> Flags:
    return images.readable & ~images.plain


def _other(low: Ints, high: Ints, owner: Ints) -> Ints:
    """An owner of the two that is not this one, or NOBODY."""
    return np.where((low != owner) | (low == NOBODY), low, np.where(high != owner, high, NOBODY))


def _by_owner(owner: Ints, found: Ints, num_owners: int) -> Ints:
    """What was found for one of each owner's images, or NOBODY."""
    by_owner = np.full(num_owners, NOBODY, np.int64)
    known = found != NOBODY
    by_owner[owner[known]] = found[known]
    return by_owner
