"""Knowledge bases for releases whose layout has none of its own: the entities of another layout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_prep.jsonl_release import ENTITY_FILES, JsonlKb
from data_prep.mimic_kb import KB_FILE, MimicKb
from data_prep.release import Finding, RawEntity, ReleaseOptions
from dsmip.errors import UserError


class KnowledgeBase(Protocol):
    """The entities of a layout, without its mentions."""

    def files(self) -> Sequence[tuple[str, Path]]:
        """Every file that they are made from, under its name in its folder."""

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the file, and findings of records that could not be read."""

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Entity ids and records as they are, of all records that have an id."""


_READERS: Mapping[str, Callable[[Path, ReleaseOptions], KnowledgeBase]] = {
    KB_FILE: MimicKb,
    **dict.fromkeys(ENTITY_FILES, JsonlKb),
}


def knowledge_base_file(folder: Path, options: ReleaseOptions) -> Path:
    """The file of the knowledge base: `options.kb` or in that folder, else in the release's folder.

    Raises:
        UserError: there is none.
    """
    names = ", ".join(_READERS)
    place = folder if options.kb is None else options.kb
    if place.is_file():
        if place.name not in _READERS:
            raise UserError(f"{place}: no knowledge base; known are files named {names}")
        return place
    for name in _READERS:
        if (place / name).is_file():
            return place / name
    if options.kb is None:
        raise UserError(
            f"{folder}: has no knowledge base ({names}); say by --kb where it is: such a file or its folder"
        )
    raise UserError(f"{place}: looked for a knowledge base ({names}), found none")


def open_knowledge_base(file: Path, options: ReleaseOptions) -> KnowledgeBase:
    """The reader of a file that `knowledge_base_file` has found; the file's name says its layout.

    Raises:
        UserError: a text is chosen that only the MIMIC layout has, or a part of the knowledge base is damaged.
    """
    if file.name != KB_FILE and options.entity_text != ReleaseOptions().entity_text:
        raise UserError(f"{file}: has one text of each entity; leave --entity-text out, or bring a {KB_FILE}")
    return _READERS[file.name](file, options)
