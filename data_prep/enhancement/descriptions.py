"""Tables of descriptions: a knowledge base's own names and texts, or lines of Wikidata's labels and descriptions."""

import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.storage.parsing import parse_json

_ROWS_AT_ONCE = 4096
_WORD = re.compile(r"\w+")
_FORM = '{"label": "Elm", "description": "genus of trees", "aliases": []}'


@dataclass(frozen=True, slots=True)
class Description:
    """What stands in a table under a name."""

    name: str
    text: str
    aliases: tuple[str, ...] = ()


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as names and sentences are compared: case and width of letters do not count."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def of_knowledge_base(dataset: Dataset) -> Iterator[Description]:
    """Names and texts of all entities that have a text, in row order."""
    table = dataset.entity_texts().select(["name", "attributes"])
    for start in range(0, len(table), _ROWS_AT_ONCE):
        for row in table.slice(start, _ROWS_AT_ONCE).to_pylist():
            if row["attributes"].strip():
                yield Description(row["name"], row["attributes"].strip())


def of_file(path: Path, language: str) -> Iterator[Description]:
    """Those of a file with one JSON object a line (also `.gz`): of a plain form, or Wikidata's own dump.

    Args:
        path: The file.
        language: Of the dump's labels, descriptions and aliases.

    Raises:
        UserError: It is missing, a line is no JSON object, or no line has a label and a description.
    """
    found = False
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                record = line.strip().rstrip(b",")
                if record in (b"", b"[", b"]"):  # a dump is an array with an element a line
                    continue
                value = parse_json(record, f"{path}: line {number}")
                if not isinstance(value, dict):
                    raise UserError(f"{path}: line {number}: expected an object such as {_FORM}")
                description = _description(value, language)
                if description is not None:
                    found = True
                    yield description
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"descriptions {path} cannot be read: {error}") from None
    if not found:
        raise UserError(f"{path}: no line has a label and a description; expected lines such as {_FORM}")


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _description(record: Mapping[str, Any], language: str) -> Description | None:
    if "labels" in record or "descriptions" in record:
        name, text = _in_dump(record, "labels", language), _in_dump(record, "descriptions", language)
        listed = record.get("aliases")
        of_language = listed.get(language, []) if isinstance(listed, dict) else []
        aliases = [each.get("value") for each in of_language if isinstance(each, dict)]
    else:
        name, text = record.get("label", record.get("name")), record.get("description", record.get("desc"))
        listed = record.get("aliases")
        aliases = listed if isinstance(listed, list) else []
    if not (isinstance(name, str) and isinstance(text, str) and name.strip() and text.strip()):
        return None
    return Description(name.strip(), text.strip(), tuple(each for each in aliases if isinstance(each, str)))


def _in_dump(record: Mapping[str, Any], key: str, language: str) -> Any:
    values = record.get(key)
    value = values.get(language) if isinstance(values, dict) else None
    return value.get("value") if isinstance(value, dict) else None
