"""Registry of layouts, and of the knowledge bases that they lend.

Each module of this package that declares a `LAYOUT` is a layout, found by being there.
"""

import importlib
import pkgutil
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from data_prep import formats
from data_prep.formats.release import KnowledgeBase, KnowledgeBaseReader, Layout, Release, ReleaseOptions
from dsmip.errors import UserError

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")


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
    folder: Path, layout: str | None, options: ReleaseOptions, notice: Callable[[str], None] = lambda line: None
) -> Release:
    """Opens a release.

    Args:
        folder: Where it lies, or the folder around it.
        layout: Name of its layout; None: the first one that fits.
        options: What to take of it.
        notice: Called with a line that names the layout, where it was found.

    Raises:
        UserError: There is no such folder or layout, it is an archive, nothing or more than one fits, or the release is
            wrong.
    """
    known = layouts()
    if layout is not None and layout not in known:
        raise UserError(f"--format {layout} is unknown; known: {', '.join(known)}, demo")
    if folder.is_file():
        what = f"an archive; {_unpacking(folder)}" if _is_archive(folder) else "a file"
        raise UserError(f"{folder}: is {what}; a release is given by its folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    candidates = known if layout is None else {layout: known[layout]}
    found = folder if _fitting(candidates, folder) else _one_down(candidates, folder)
    if found is None and layout is None:
        archives = sorted(path for path in folder.iterdir() if _is_archive(path))
        hint = f"it holds {archives[0].name}; {_unpacking(archives[0])}" if archives else "choose one by --format"
        raise UserError(f"{folder}: no layout that is known ({', '.join(known)}); {hint}")
    if found is not None and (layout is None or found != folder):
        layout, *others = _fitting(candidates, found)
        notice(f"{found}: layout {layout}" + (f" ({', '.join(others)} would fit too: --format)" if others else ""))
    assert layout is not None
    return known[layout].open(found or folder, options)


def _fitting(candidates: Mapping[str, Layout], folder: Path) -> list[str]:
    return [name for name, layout in candidates.items() if layout.fits(folder)]


def _one_down(candidates: Mapping[str, Layout], folder: Path) -> Path | None:
    """The only folder in this one that a layout fits.

    Raises:
        UserError: There are several.
    """
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [path for path in inner if _fitting(candidates, path)]
    if len(found) > 1:
        raise UserError(f"{folder}: holds {len(found)} releases; choose one, as {found[0]} or {found[1]}")
    return found[0] if found else None


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_ARCHIVES) and path.is_file()


def _unpacking(archive: Path) -> str:
    command = "unzip" if archive.suffix.lower() == ".zip" else "tar -xf"
    return f"unpack it first, as by: {command} {shlex.quote(str(archive))}"


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
