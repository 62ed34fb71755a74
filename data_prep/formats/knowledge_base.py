"""Knowledge bases for releases whose layout has none of its own: the entities of another layout, and their titles."""

import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote

from data_prep.formats.registry import layouts
from data_prep.formats.release import KnowledgeBase, KnowledgeBaseReader, RawEntity, ReleaseOptions
from dsmip.errors import UserError

_PAGE_FIELDS = ("wiki_url", "url", "title")


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


def wiki_title(reference: str) -> str:
    """The title that a reference means, an address or a title; "" if none.

    Of an address it is what follows /wiki/, up to ? or #: neither the damaged schemes of WikiDiverse's addresses
    ("nhttps://", "]https://") nor the language of a Wikipedia count. Both are percent-decoded; underscores are spaces,
    and the first letter has no case: so Wikipedia has it.
    """
    _, is_address, page = reference.partition("/wiki/")
    text = unquote(re.split("[?#]", page, maxsplit=1)[0] if is_address else reference)
    text = " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())
    return text[:1].upper() + text[1:]


def entities_by_title(titles: Collection[str], kb: KnowledgeBase) -> Mapping[str, str]:
    """The entity id for each of some titles that the knowledge base can tell.

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
