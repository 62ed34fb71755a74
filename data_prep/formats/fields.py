"""Fields of records as they are read from JSON or parquet: their types, their texts, and which become groups."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.formats.release import Finding
from dsmip.errors import UserError

Types = Mapping[str, type | tuple[type, ...]]

_ESCAPES = re.compile(r"(?:%[0-9A-Fa-f]{2})+")


def type_problem(record: Any, types: Types) -> str:
    """What is wrong with a record's types, or an empty text; absent and null are left to the rules of all layouts."""
    if not isinstance(record, dict):
        return f"record is {type(record).__name__}"
    for name, expected in sorted(types.items()):
        value = record.get(name)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            return f"{name} is {type(value).__name__}"
        if isinstance(value, list) and any(not isinstance(item, str | None) for item in value):
            return f"{name} holds something else than names"
    return ""


def without_wrong(record: Any, optional: Types) -> tuple[Any, list[str]]:
    """A record with null for each optional field of a wrong type, and what was wrong with these.

    A text where a list of names is wanted is a list of one; a list of one text where a text is wanted is the text, an
    empty one is null. Of a list, only what is no name is lost.
    """
    if not isinstance(record, dict):
        return record, []
    usable, problems = dict(record), []
    for name, expected in sorted(optional.items()):
        value = record.get(name)
        if expected is list and isinstance(value, str):
            value = [value]
        elif expected is str and isinstance(value, list) and len(value) < 2:
            value = value[0] if value else None
        if problem := type_problem({name: value}, {name: expected}):
            problems.append(problem)
            is_list = expected is list and isinstance(value, list)
            value = [item for item in value or () if isinstance(item, str)] if is_list else None
        if name in record:
            usable[name] = value
    return usable, problems


def id_of(record: Any, name: str) -> str:
    """The id that a record has in a field, or "": also of a record that is wrong otherwise."""
    value = record.get(name) if isinstance(record, dict) else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field that is a text or a number, stripped; "" where it is absent or null."""
    value = record.get(name)
    return "" if value is None else str(value).strip()


def groups_of(record: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    """The fields that a layout does not know, where they are texts, numbers or true / false."""
    unknown = {name: value for name, value in record.items() if name not in known}
    return {name: str(value) for name, value in sorted(unknown.items()) if isinstance(value, str | int | float)}


def percent_decoded(text: str) -> str:
    """A text without percent escapes; a run of escapes that is no UTF-8 stays, and so does a bare "%"."""

    def decoded(run: re.Match[str]) -> str:
        try:
            return bytes.fromhex(run[0].replace("%", "")).decode()
        except UnicodeDecodeError:
            return run[0]

    return _ESCAPES.sub(decoded, text)


class ChosenField:
    """A text that a user asked for: records without it are degraded; if all are, asking was a mistake.

    Args:
        path: The file of the records.
        name: The text's field.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._records = self._present = 0

    def findings(self, position: int, record: Mapping[str, Any], record_id: str) -> Iterator[Finding]:
        """A finding if this record, of that id, does not have it."""
        present = record.get(self._name) is not None
        self._records += 1
        self._present += present
        if not present:
            yield Finding(self._path.name, position, f"no {self._name}", "degraded", "", record_id)

    def finish(self) -> None:
        """Ends the count.

        Raises:
            UserError: No record has the text.
        """
        if self._records and not self._present:
            raise UserError(f'{self._path}: no record has the key "{self._name}"; choose another text of the release')
