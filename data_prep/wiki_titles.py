"""Which entity a Wikipedia address means: addresses and titles are compared as the titles of pages."""

import re
import unicodedata
from collections.abc import Collection, Mapping
from urllib.parse import unquote

from data_prep.knowledge_base import KnowledgeBase
from data_prep.release import RawEntity

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
