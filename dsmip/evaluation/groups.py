"""Groups of mentions that a report breaks figures down by: the data set's own, and what is known of every data set.

gold_seen   seen, unseen: whether the gold entity is the gold of some training mention, of the data that the model was
            trained on; not told where these are not there.
picture     mention+entity, mention only, entity only, none: who has a picture, the mention and its gold entity.
ambiguity   ambiguous, unique: whether the mention's word stands for several entities, upper and lower case being equal:
            the entities with this name and the golds of all mentions, of any split, with this word.
A group that the data set itself has under one of these names stands as it is.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dsmip.data.dataset import Dataset
from dsmip.data.manifest import SPLITS
from dsmip.data.records import Mention

KIND = "kind"
GOLD_SEEN, PICTURE, AMBIGUITY = "gold_seen", "picture", "ambiguity"
# Columns of ranks.parquet; all groups of the data set itself are in its column `groups`.
REPORTED = (KIND, GOLD_SEEN, PICTURE, AMBIGUITY)

_PICTURES = {
    (True, True): "mention+entity",
    (True, False): "mention only",
    (False, True): "entity only",
    (False, False): "none",
}


def report_groups(dataset: Dataset, mentions: Sequence[Mention], trained_on: Dataset | None) -> list[dict[str, str]]:
    """Group values of each mention by group name. Reads all splits.

    Args:
        dataset: The mentions'.
        mentions: Of a split of it.
        trained_on: The data that the model was trained on; None: not known.

    Raises:
        UserError: A shard is missing or damaged.
    """
    own = {name for mention in mentions for name in mention.groups}
    kb = dataset.entity_texts()
    num_images_E = kb.column("num_images").to_pylist()
    _, entities_of = _golds_and_words(dataset)
    train_golds = None if trained_on is None else _golds_and_words(trained_on)[0]
    groups = []
    for mention in mentions:
        seen = {} if train_golds is None else {GOLD_SEEN: "seen" if mention.entity_id in train_golds else "unseen"}
        derived = {
            **seen,
            PICTURE: _PICTURES[mention.image is not None, num_images_E[mention.entity_row] > 0],
            AMBIGUITY: "ambiguous" if len(entities_of[_key(mention.word)]) > 1 else "unique",
        }
        groups.append({name: value for name, value in derived.items() if name not in own} | dict(mention.groups))
    return groups


def stored_groups(row: Mapping[str, Any]) -> dict[str, str]:
    """Group values of a mention by group name, from its row of ranks.parquet; an old one has no column `groups`."""
    return {name: row[name] for name in REPORTED if row[name]} | dict(row.get("groups") or ())


def num_meanings(dataset: Dataset, words: Sequence[str]) -> list[int]:
    """How many entities each word stands for, as `ambiguity` counts them. Reads all splits.

    Raises:
        UserError: A shard is missing or damaged.
    """
    _, entities_of = _golds_and_words(dataset)
    return [len(entities_of.get(_key(word), ())) for word in words]


def rows_by_value(groups: Sequence[Mapping[str, str]], name: str) -> dict[str, list[bool]]:
    """Which mentions have each value of a group, by sorted value; the value of those outside the group is ''."""
    values = [each.get(name, "") for each in groups]
    return {value: [each == value for each in values] for value in sorted(set(values))}


@lru_cache(maxsize=2)  # several models are often evaluated one after the other
def _golds_and_words(dataset: Dataset) -> tuple[set[str], defaultdict[str, set[int]]]:
    """Entity ids that are golds of training mentions, and kb rows that each word stands for."""
    train_golds: set[str] = set()
    entities_of: defaultdict[str, set[int]] = defaultdict(set)
    for split in SPLITS:
        for mention in dataset.texts(split):
            entities_of[_key(mention.word)].add(mention.entity_row)
            if split == "train":
                train_golds.add(mention.entity_id)
    for row, name in enumerate(dataset.entity_texts().column("name").to_pylist()):
        entities_of[_key(name)].add(row)
    return train_golds, entities_of


def _key(word: str) -> str:
    return word.strip().casefold()
