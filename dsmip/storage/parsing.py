"""JSON and YAML texts as values; whatever a text holds that is none ends in one line with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dsmip.errors import UserError

Result = TypeVar("Result")

NOT_AS_WRITTEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading and taking apart a file's JSON may raise where it is not what this program wrote."""


def parse_json(content: bytes, path: Path | str) -> Any:
    """Parsed JSON.

    Raises:
        UserError: naming file, line and column of what is wrong.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} column {error.colno}: wrong JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise UserError(f"{path}: line {line} column {column}: not UTF-8 text") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: a number of too many digits") from error


def parse_json_object(content: bytes, path: str) -> dict[str, Any]:
    """The JSON object of a text; `path` is for messages.

    Raises:
        UserError: It holds none.
    """
    value = parse_json(content, path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path, take: Callable[[Any], Result], remedy: str = "") -> Result:
    """What `take` finds in a JSON file that this program has written.

    Args:
        path: The file.
        take: Takes the value apart.
        remedy: How the message ends: what to do when the file is damaged.

    Raises:
        UserError: It is damaged: no JSON, or not what `take` expects.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        return take(json.loads(content))
    except NOT_AS_WRITTEN as error:
        reason = " ".join(repr(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}){remedy}") from error


def parse_yaml(text: str, source: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parsed YAML; `source` is what the text is called in messages.

    Raises:
        UserError: It is no YAML, or holds what no value can be made of: a date that is none, a number of too many
            digits, thousands of brackets in one another.
    """
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source} is not valid YAML: nested too deeply") from error
    except (ValueError, OverflowError, TypeError, AttributeError) as error:  # of int(), date() and the like
        raise UserError(f"{source} is not valid YAML: a value cannot be read ({error})") from error
