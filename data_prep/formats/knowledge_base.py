"""Knowledge bases for releases whose layout has none of its own: the entities of another layout, and their titles."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from data_prep.formats.jsonl import ENTITY_FILES, JsonlKb
from data_prep.formats.mimic import KB_FILE, MimicKb
from data_prep.formats.release import Finding, RawEntity, ReleaseOptions
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


_PAGE_FIELDS = ("wiki_url", "url", "title")


def wiki_title(reference: str) -> str:
    """The title that an address or a title means; "" if none.

    Of an address it is what follows /wiki/, up to ? or #: neither the damaged schemes of WikiDiverse's addresses
    ("nhttps://", "]https://") nor the language of a Wikipedia count. Both are percent-decoded; underscores are spaces,
    and the first letter has no case: so Wikipedia has it.
    """
    _, is_address, page = reference.partition("/wiki/")
    text = unquote(re.split("[?#]", page, maxsplit=1)[0] if is_address else reference)
    text = " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())
    return text[:1].upper() + text[1:]


def entities_by_title(titles: Collection[str], kb: KnowledgeBase) -> Mapping[str, str]:
    """The entity id for each of `titles` that the knowledge base can tell.

    An entity has a title by its entity id, else by its record's field wiki_url, url or title, else by its name. What
    comes first in this order decides; a title that two entities have in the same way belongs to none.
    """
    by_id: dict[str, set[str]] = {}
    by_page: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}

    def note(found: dict[str, set[str]], reference: str, entity_id: str) -> None:
        title = wiki_title(reference)
        if title in titles:
            found.setdefault(title, set()).add(entity_id)

    for entity in kb.entities():
        if isinstance(entity, RawEntity):
            note(by_id, entity.entity_id, entity.entity_id)
            note(by_name, entity.name, entity.entity_id)
    for entity_id, record in kb.records():
        for field in _PAGE_FIELDS:
            if isinstance(reference := record.get(field), str):
                note(by_page, reference, entity_id)
    found = by_name | by_page | by_id
    return {title: next(iter(entity_ids)) for title, entity_ids in found.items() if len(entity_ids) == 1}
