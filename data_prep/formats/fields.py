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
        if isinstance(value, list) and any(not isinstance(item, str) for item in value):
            return f"{name} holds something else than names"
    return ""


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

    def findings(self, position: int, record: Mapping[str, Any]) -> Iterator[Finding]:
        """A finding if this record does not have it."""
        present = record.get(self._name) is not None
        self._records += 1
        self._present += present
        if not present:
            yield Finding(self._path.name, position, f"no {self._name}", "degraded")

    def finish(self) -> None:
        """Ends the count.

        Raises:
            UserError: No record has the text.
        """
        if self._records and not self._present:
            raise UserError(f'{self._path}: no record has the key "{self._name}"; choose another text of the release')
