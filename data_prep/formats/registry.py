"""The layouts that `dsmip prepare` takes: which parser reads which, and which one a folder holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.formats.jsonl import JsonlRelease
from data_prep.formats.melbench import MelbenchRelease
from data_prep.formats.mimic import MimicRelease
from data_prep.formats.release import Release, ReleaseOptions
from data_prep.formats.wikidiverse import WikidiverseRelease
from dsmip.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """A parser, and whether a folder looks like what it reads."""

    open: Callable[[Path, ReleaseOptions], Release]
    fits: Callable[[Path], bool]


LAYOUTS: Mapping[str, Layout] = {
    "mimic": Layout(MimicRelease, MimicRelease.fits),
    "melbench": Layout(MelbenchRelease, MelbenchRelease.fits),
    "wikidiverse": Layout(WikidiverseRelease, WikidiverseRelease.fits),
    "jsonl": Layout(JsonlRelease, JsonlRelease.fits),
}


def open_release(
    folder: Path, layout: str | None, options: ReleaseOptions, notice: Callable[[str], None] = print
) -> Release:
    """The release in `folder`, in the layout of that name or (None) in the first one that fits; `notice` is told.

    Raises:
        UserError: no such folder, no such layout, or nothing fits.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"--format {layout} is unknown; known: {', '.join(LAYOUTS)}, demo")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if layout is None:
        fitting = [name for name, candidate in LAYOUTS.items() if candidate.fits(folder)]
        if not fitting:
            raise UserError(f"{folder}: no layout that is known ({', '.join(LAYOUTS)}); choose one by --format")
        layout, others = fitting[0], fitting[1:]
        notice(f"{folder}: layout {layout}" + (f" ({', '.join(others)} would fit too: --format)" if others else ""))
    return LAYOUTS[layout].open(folder, options)
