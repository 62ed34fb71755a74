"""What a parser of a raw release delivers, and the rules that hold for every release.

A parser reads one layout and checks types; `checked_entities` and `checked_mentions` decide what is kept. Nothing is
lost silently: every record that is left out, repaired or degraded leaves a `Finding`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

Action = Literal["rejected", "repaired", "degraded"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One touched record: `source` is the file, `record` its position there, `detail` what it was about."""

    source: str
    record: int
    reason: str
    action: Action
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RawEntity:
    """An entity of a release. `pictures` are files named by the record; those that do not exist are None."""

    source: str
    record: int
    entity_id: str
    name: str
    attributes: str
    pictures: tuple["RawPicture", ...] = ()


@dataclass(frozen=True, slots=True)
class RawMention:
    """A mention of a release; `gold` is an entity id, or None where the release has none."""

    source: str
    record: int
    mention_id: str
    word: str
    sentence: str
    gold: str | None
    groups: Mapping[str, str] = field(default_factory=dict)
    picture: "RawPicture | None" = None


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A picture that a record names, and the file that was found for it (None: lost)."""

    name: str
    path: Path | None


class Release(Protocol):
    """A raw release on disk. Both iterators also deliver findings of records that they could not read."""

    folder: Path

    def sha256(self) -> str:
        """Digest of everything that a dataset made from this release depends on."""

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in release order."""

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions of "train", "validation" or "test" in release order."""


def checked_entities(items: Iterable[RawEntity | Finding], findings: list[Finding]) -> list[RawEntity]:
    """Entities to keep, in release order: their place in the list is their kb row. Appends to `findings`.

    Rejected: text with lone surrogates, no entity id, an id that came before. Kept and degraded: empty name, empty
    attributes.
    """
    kept: list[RawEntity] = []
    known: set[str] = set()
    for item in items:
        if isinstance(item, Finding):
            findings.append(item)
        elif not _is_text(item.entity_id, item.name, item.attributes):
            findings.append(Finding(item.source, item.record, "broken text", "rejected"))
        elif not item.entity_id:
            findings.append(Finding(item.source, item.record, "no entity id", "rejected"))
        elif item.entity_id in known:
            findings.append(Finding(item.source, item.record, "duplicate entity", "rejected", item.entity_id))
        else:
            known.add(item.entity_id)
            kept.append(item)
            empty = [name for name, text in (("name", item.name), ("attributes", item.attributes)) if not text]
            for name in empty:
                findings.append(Finding(item.source, item.record, f"empty {name}", "degraded", item.entity_id))
    return kept


def checked_mentions(
    items: Iterable[RawMention | Finding], row_of: Mapping[str, int], findings: list[Finding]
) -> list[RawMention]:
    """Mentions to keep, in release order. Appends to `findings`.

    Rejected: text with lone surrogates, nil, null or unknown gold, empty word. Repaired: no id (file and position make
    one). Kept and degraded: empty sentence.
    """
    kept: list[RawMention] = []
    for item in items:
        if isinstance(item, Finding):
            findings.append(item)
            continue
        if reason := _no_target(item, row_of):
            detail = item.gold or "" if reason == "unknown gold" else ""
            findings.append(Finding(item.source, item.record, reason, "rejected", detail))
            continue
        if not item.mention_id:
            item = replace(item, mention_id=f"{Path(item.source).stem}-{item.record}")
            findings.append(Finding(item.source, item.record, "no mention id", "repaired"))
        if not item.sentence:
            findings.append(Finding(item.source, item.record, "empty sentence", "degraded", item.mention_id))
        kept.append(item)
    return kept


def _no_target(item: RawMention, row_of: Mapping[str, int]) -> str | None:
    """Why a mention cannot be linked, or None."""
    groups = [text for pair in item.groups.items() for text in pair]
    if not _is_text(item.mention_id, item.word, item.sentence, item.gold or "", *groups):
        return "broken text"
    if not item.word:
        return "empty word"
    if not item.gold:
        return "null gold"
    if item.gold.lower() == "nil":
        return "nil gold"
    return None if item.gold in row_of else "unknown gold"


def _is_text(*texts: str) -> bool:
    """False where JSON escapes made lone surrogates, which no file can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True
