"""Splits of releases whose mentions lie in one file: by lists of ids, or by groups that share sentences or pictures.

Files of ids:

    splits.json                               {"train": [id, ...], "dev": [...], "test": [...]}
    train_ids.txt dev_ids.txt test_ids.txt    one id a line

"dev" may also be called valid, val or validation. The first form is that of WikiMEL's split in GHMFC's repository.

Groups: records that have a sentence or a picture in common, directly or through other records, form a group, and a
group lands in one split whole. (In the circulated WikiMEL split, test mentions stand in captions that training has
seen.)
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.formats.json_records import object_records
from dsmip.data.manifest import SPLITS
from dsmip.data.sampler import permutation
from dsmip.errors import UserError

_NAMES = {"train": ("train",), "validation": ("dev", "valid", "val", "validation"), "test": ("test",)}
_TABLE = "splits.json"


class SplitFiles:
    """The files of ids in a folder.

    Attributes:
        paths: The files; none if the folder has none.
        split_of: The split of each id.

    Raises:
        UserError: A split is missing or comes twice, an id is in two splits or no text or whole number, or a file
            cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.paths: Sequence[Path] = ()
        self.split_of: Mapping[str, str] = {}
        table = folder / _TABLE
        if table.is_file():
            self.paths = (table,)
            self.split_of = _by_id(table, _table_ids(table))
        elif lists := _lists(folder):
            self.paths = tuple(lists.values())
            self.split_of = _by_id(folder, {split: list(_line_ids(path)) for split, path in lists.items()})


def _lists(folder: Path) -> dict[str, Path]:
    found = {
        split: [folder / f"{name}_ids.txt" for name in names if (folder / f"{name}_ids.txt").is_file()]
        for split, names in _NAMES.items()
    }
    if not any(found.values()):
        return {}
    for split, paths in found.items():
        if len(paths) != 1:
            shown = " and ".join(path.name for path in paths) or f"no {_NAMES[split][0]}_ids.txt"
            raise UserError(f"{folder}: files of ids need one for {split}, found {shown}")
    return {split: paths[0] for split, paths in found.items()}


def _table_ids(path: Path) -> dict[str, list[str]]:
    table: dict[str, Any] = {}
    for name, value in object_records(path):
        split = next((split for split, names in _NAMES.items() if name in names), None)
        if split is None or split in table:
            raise UserError(f"{path}: {json.dumps(name)} is no split or comes twice; takes train, dev and test")
        if not isinstance(value, list) or any(not isinstance(one, str | int) or isinstance(one, bool) for one in value):
            raise UserError(f"{path}: {name} must be a list of ids (texts or whole numbers)")
        table[split] = [str(one) for one in value]
    if missing := [_NAMES[split][0] for split in _NAMES if split not in table]:
        raise UserError(f"{path}: has no {' and no '.join(missing)}")
    return table


def _line_ids(path: Path) -> Iterator[str]:
    try:
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _by_id(path: Path, ids: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The split of each id; `path` is named where an id has two."""
    split_of: dict[str, str] = {}
    for split, members in ids.items():
        for one in members:
            if split_of.setdefault(one, split) != split:
                raise UserError(f"{path}: id {one!r} is in {split_of[one]} and in {split}")
    return split_of


@dataclass(frozen=True, slots=True)
class SplitItem:
    """A record to be put into a split.

    Attributes:
        sentence: Its sentence.
        image: What tells its image's file from others; None: it has none.
        size: How many mentions it has, at least 1.
    """

    sentence: str
    image: str | None
    size: int


def split_choices(percentages: tuple[int, int, int], seed: int) -> dict[str, str]:
    """What the manifest says of a split by `grouped_split`, of percentages of train, validation and test.

    Raises:
        UserError: They are no shares of a whole, or training has none.
    """
    if sum(percentages) != 100 or min(percentages) < 0 or percentages[0] == 0:
        shown = "/".join(map(str, percentages))
        raise UserError(f"--split {shown}: takes percentages of train/validation/test that sum to 100, as 70/10/20")
    shares = "/".join(map(str, percentages))
    return {"split": shares, "split_seed": str(seed), "split_groups": "sentence and picture"}


def grouped_split(items: Iterable[SplitItem], percentages: tuple[int, int, int], seed: int) -> list[str]:
    """The split of each item; depends on the items, their order and the seed alone.

    Only hashes are kept of the items.

    Sentences are equal here when they differ only in case, width and white space; empty ones join nothing. Large groups
    come first, equal ones in the seed's order, each into the split where most mentions are wanting: no split exceeds
    its share of the mentions by as much as the largest group. A split that has a share and got no group then takes the
    smallest one of a split that has several.

    Args:
        items: The records.
        percentages: Shares of train, validation and test.
        seed: Orders groups of equal size.
    """
    roots, sizes = _groups(items)
    group_sizes = dict.fromkeys(roots, 0)
    for root, size in zip(roots, sizes, strict=True):
        group_sizes[root] += size
    groups = list(group_sizes)
    order = [groups[index] for index in permutation(len(groups), "grouped split", seed).tolist()]
    split_of = {}
    wanting = [sum(sizes) * percentage for percentage in percentages]  # hundredths of mentions
    for root in sorted(order, key=group_sizes.__getitem__, reverse=True):
        chosen = wanting.index(max(wanting))
        wanting[chosen] -= 100 * group_sizes[root]
        split_of[root] = SPLITS[chosen]
    for split, percentage in zip(SPLITS, percentages, strict=True):
        if percentage and split not in split_of.values():
            held = Counter(split_of.values())
            spare = [root for root in split_of if held[split_of[root]] > 1]
            if spare:
                split_of[min(spare, key=group_sizes.__getitem__)] = split
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
    if item.image is not None:
        yield _digest("picture", item.image)


def _digest(*texts: str) -> bytes:
    # Surrogates: broken texts come this far, too.
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
