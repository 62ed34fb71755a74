"""What a parser of a raw release delivers, and the rules that hold for every release.

A parser reads one layout and checks types; `checked_entities` and `checked_mentions` decide what is kept. Nothing is
lost silently: every record that is left out, repaired or degraded leaves a `Finding`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """A picture that a record names, and the file that was found for it (None: lost).

    member: its name in the zip `path`, or None for a plain file. size: in bytes, as stored outside of the zip.
    """

    name: str
    path: Path | None
    member: str | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class ReleaseOptions:
    """What a user chose of a release; a parser refuses (UserError) what its layout does not have.

    entity_text: field of the attributes. mention_text: what the sentence is made of. kb: where the knowledge base is,
    for layouts without one. split: percentages of train, validation and test, for layouts without splits.
    """

    entity_text: Literal["attr", "desc"] = "attr"
    mention_text: Literal["sentence", "sentence+desc"] = "sentence"
    kb: Path | None = None
    split: tuple[int, int, int] | None = None
    seed: int = 0


class Release(Protocol):
    """A raw release on disk. Both iterators also deliver findings of records that they could not read.

    folder: its name goes into the manifest. layout: the parser's name. choices: what was chosen of the release (which
    text, which split); goes into the manifest.
    """

    folder: Path
    layout: str
    choices: Mapping[str, str]

    def files(self) -> Sequence[tuple[str, Path]]:
        """Every file that a dataset made from this release depends on, under a name that is the same everywhere."""

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in release order."""

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions of "train", "validation" or "test" in release order."""


def checked_entities(items: Iterable[RawEntity | Finding], note: Callable[[Finding], object]) -> Iterator[RawEntity]:
    """Entities to keep, in release order: their place is their kb row. `note` takes the findings.

    Rejected: text with lone surrogates, no entity id, an id that came before. Kept and degraded: empty name, empty
    attributes.
    """
    known: set[str] = set()
    for item in items:
        if isinstance(item, Finding):
            note(item)
        elif not _is_text(item.entity_id, item.name, item.attributes):
            note(Finding(item.source, item.record, "broken text", "rejected"))
        elif not item.entity_id:
            note(Finding(item.source, item.record, "no entity id", "rejected"))
        elif item.entity_id in known:
            note(Finding(item.source, item.record, "duplicate entity", "rejected", item.entity_id))
        else:
            known.add(item.entity_id)
            empty = [name for name, text in (("name", item.name), ("attributes", item.attributes)) if not text]
            for name in empty:
                note(Finding(item.source, item.record, f"empty {name}", "degraded", item.entity_id))
            yield item


def checked_mentions(
    items: Iterable[RawMention | Finding], row_of: Mapping[str, int], note: Callable[[Finding], object]
) -> Iterator[RawMention]:
    """Mentions to keep, in release order. `note` takes the findings.

    Rejected: text with lone surrogates, nil, null or unknown gold, empty word. Repaired: no id (file and position make
    one). Kept and degraded: empty sentence.
    """
    for item in items:
        if isinstance(item, Finding):
            note(item)
            continue
        if reason := _no_target(item, row_of):
            detail = item.gold or "" if reason == "unknown gold" else ""
            note(Finding(item.source, item.record, reason, "rejected", detail))
            continue
        if not item.mention_id:
            item = replace(item, mention_id=f"{Path(item.source).stem}-{item.record}")
            note(Finding(item.source, item.record, "no mention id", "repaired"))
        if not item.sentence:
            note(Finding(item.source, item.record, "empty sentence", "degraded", item.mention_id))
        yield item


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
