"""Published systems, one file each. A file in this room or one inside it that defines a `System` is found by itself."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

from dsmip.errors import UserError
from dsmip.models.base import System


@cache
def systems() -> dict[str, type[System]]:
    """All systems by name."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return {system.name: system for system in _subclasses(System)}


def _subclasses(of: type[Any]) -> Iterator[type[System]]:
    """Those that can be built, in the order of their definition."""
    for system in of.__subclasses__():
        if not inspect.isabstract(system):
            yield system
        yield from _subclasses(system)


def find_system(name: str) -> type[System]:
    """The system of that name.

    Raises:
        UserError: There is none; the nearest one is named.
    """
    known = systems()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"unknown model '{name}'; did you mean '{near[0]}'? (known: {', '.join(sorted(known))})")
    return known[name]
