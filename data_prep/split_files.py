"""Files of ids that say which split a record is in.

    splits.json                               {"train": [id, ...], "dev": [...], "test": [...]}
    train_ids.txt dev_ids.txt test_ids.txt    one id a line

"dev" may also be called valid, val or validation. The first form is that of WikiMEL's split in GHMFC's repository.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.json_records import object_records
from dsmip.errors import UserError

_NAMES = {"train": ("train",), "validation": ("dev", "valid", "val", "validation"), "test": ("test",)}
_TABLE = "splits.json"


class SplitFiles:
    """The files of ids in a folder: `paths`, none if it has none; `split_of` says where an id belongs.

    Raises:
        UserError: a split is missing or comes twice, an id is in two splits or no text or whole number, or a file
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


def _by_id(place: Path, ids: Mapping[str, Sequence[str]]) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for split, members in ids.items():
        for one in members:
            if split_of.setdefault(one, split) != split:
                raise UserError(f"{place}: id {one!r} is in {split_of[one]} and in {split}")
    return split_of
