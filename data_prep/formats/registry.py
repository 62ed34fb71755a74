"""Registry of layouts, and of the knowledge bases that they lend.

Each module of this package that declares a `LAYOUT` is a layout, found by being there.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

from data_prep import formats
from data_prep.formats.release import KnowledgeBase, KnowledgeBaseReader, Layout, Release, ReleaseOptions
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


def knowledge_base_file(folder: Path, options: ReleaseOptions) -> Path:
    """The file of the knowledge base: `options.kb` or in that folder, else in the release's folder.

    Args:
        folder: The release's folder.
        options: Their `kb` counts.

    Raises:
        UserError: There is none.
    """
    readers = _readers()
    names = ", ".join(readers)
    path = folder if options.kb is None else options.kb
    if path.is_file():
        if path.name not in readers:
            raise UserError(f"{path}: no knowledge base; known are files named {names}")
        return path
    for name in readers:
        if (path / name).is_file():
            return path / name
    if options.kb is None:
        raise UserError(
            f"{folder}: has no knowledge base ({names}); say by --kb where it is: such a file or its folder"
        )
    raise UserError(f"{path}: looked for a knowledge base ({names}), found none")


def open_knowledge_base(file: Path, options: ReleaseOptions) -> KnowledgeBase:
    """Opens a file that `knowledge_base_file` has found; the file's name says its layout.

    Raises:
        UserError: A text is chosen that its layout does not have, or a part of the knowledge base is damaged.
    """
    readers = _readers()
    reader = readers[file.name]
    if options.entity_text != ReleaseOptions().entity_text and not reader.has_descriptions:
        others = " or ".join(name for name, other in readers.items() if other.has_descriptions)
        raise UserError(f"{file}: has one text of each entity; leave --entity-text out, or bring a {others}")
    return reader.open(file, options)


def _readers() -> Mapping[str, KnowledgeBaseReader]:
    return {name: reader for layout in layouts().values() for name, reader in layout.knowledge_bases.items()}
