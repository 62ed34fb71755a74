"""Registry of layouts: each module of this package that declares a `LAYOUT` is one, found by being there."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

from data_prep import formats
from data_prep.formats.release import Layout, Release, ReleaseOptions
from dsmip.errors import UserError


def layouts() -> Mapping[str, Layout]:
    """All layouts by name, in the order in which a folder is compared with them."""
    found: list[Layout] = []
    for info in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        layout = getattr(importlib.import_module(info.name), "LAYOUT", None)
        if isinstance(layout, Layout):
            found.append(layout)
    found.sort(key=lambda layout: (layout.precedence, layout.name))
    return {layout.name: layout for layout in found}


def open_release(
    folder: Path, layout: str | None, options: ReleaseOptions, notice: Callable[[str], None] = print
) -> Release:
    """Opens a release.

    Args:
        folder: Where it lies.
        layout: Name of its layout; None: the first one that fits.
        options: What to take of it.
        notice: Called with a line that names the layout, where it was found.

    Raises:
        UserError: There is no such folder or layout, nothing fits, or the release is wrong.
    """
    known = layouts()
    if layout is not None and layout not in known:
        raise UserError(f"--format {layout} is unknown; known: {', '.join(known)}, demo")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if layout is None:
        fitting = [name for name, candidate in known.items() if candidate.fits(folder)]
        if not fitting:
            raise UserError(f"{folder}: no layout that is known ({', '.join(known)}); choose one by --format")
        layout, others = fitting[0], fitting[1:]
        notice(f"{folder}: layout {layout}" + (f" ({', '.join(others)} would fit too: --format)" if others else ""))
    return known[layout].open(folder, options)
