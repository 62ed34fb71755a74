"""Texts that keys are hashed from: the same for the same values in every version of the code.

A key names what a stored result was made from: features, a part of other settings, an index, a sweep. Whoever changes
a text that exists already costs every user the results stored under it; `tests/test_keys.py` holds them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from dsmip.config import Frozen

Plain = str | int | float | bool | None | Sequence["Plain"] | Mapping[str, "Plain"]


def plain_text(value: Plain) -> str:
    """A Python literal of plain data.

    Raises:
        TypeError: It is something else, whose text would name a class.

    >>> plain_text({"width": 8, "names": ("text", "image")})
    "{'width': 8, 'names': ('text', 'image')}"
    """
    _check_plain(value)
    return repr(value)


def _check_plain(value: Any) -> None:
    if type(value) is dict:
        _check_plain(list(value))
        _check_plain(list(value.values()))
    elif type(value) in (list, tuple):
        for each in value:
            _check_plain(each)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{type(value).__name__} is no plain data: write out what a key holds of it")


def key_tree(config: Frozen) -> dict[str, Any]:
    """What stands for a configuration in a key: its plain data, in the order of its fields.

    A field that was added since (`Frozen.added`) is left out where its value says that all is as it was before.
    """
    tree = config.model_dump(mode="json")
    _leave_out(config, tree)
    return tree


def _leave_out(value: Any, tree: Any) -> None:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            _leave_out(getattr(value, name), tree[name])
        for name, before in (value.added if isinstance(value, Frozen) else {}).items():
            if tree[name] == before:
                del tree[name]
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _leave_out(inner, tree[name])
