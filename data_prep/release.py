"""What a parser of a raw release delivers, and the rules for faulty records, which are the same for every release.

A parser reads one layout and checks types; `checked_entities` and `checked_mentions` decide what is kept (docs/data.md
tells users how). Nothing is lost silently: every record that is left out, repaired or degraded leaves a `Finding`, and
each one is either yielded or rejected once, so that inputs = in shards + rejected.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from dsmip.errors import UserError

Action = Literal["rejected", "repaired", "degraded"]

MAX_TEXT = 1 << 16  # characters; no model reads as much
MAX_ID = 256
MAX_GROUPS, MAX_GROUP_NAME, MAX_GROUP_VALUE = 32, 64, 256
_MAX_DETAIL = 200
# All but tab and line ends, which are white space.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Finding:
    """One touched record: `source` is the file, `record` its position there, `detail` what it was about.

    Whatever a release holds, a finding can be written: lone surrogates become "?", a long detail is cut.
    """

    source: str
    record: int
    reason: str
    action: Action
    detail: str = ""

    def __post_init__(self) -> None:
        detail = self.detail if len(self.detail) <= _MAX_DETAIL else self.detail[: _MAX_DETAIL - 1] + "…"
        for name, text in (("source", self.source), ("detail", detail)):
            object.__setattr__(self, name, text.encode("utf-8", "replace").decode())


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


def refuse_unknown_options(options: ReleaseOptions, layout: str, known: Sequence[str]) -> None:
    """Raises UserError where an option is set that the layout does not have."""
    for name in ("entity_text", "mention_text", "kb", "split"):
        if name not in known and getattr(options, name) != getattr(ReleaseOptions(), name):
            raise UserError(f"--{name.replace('_', '-')}: the layout {layout} has no such choice; leave it out")


Note = Callable[[Finding], object]


class UniqueIds:
    """Ids that were given out: the first one of its name stays as it is, the next ones end in -2, -3 ..."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """`wanted`, or the first free one made from it."""
        found, use = wanted, self._uses.get(wanted, 0)
        while found in self._uses:
            use += 1
            found = f"{wanted}-{use}"
        self._uses[wanted] = max(use, 1)
        self._uses.setdefault(found, 1)
        return found


def checked_entities(items: Iterable[RawEntity | Finding], note: Note) -> Iterator[RawEntity]:
    """Entities to keep, in release order: their place is their kb row. `note` takes the findings.

    Rejected: text with lone surrogates, no entity id, one that is too long or has control characters, an id that came
    before. Repaired: control characters (a space each). Degraded: a text that is too long (cut), empty name, empty
    attributes.
    """
    known: set[str] = set()
    for item in items:
        if isinstance(item, Finding):
            note(item)
        elif reason := _entity_fault(item, known):
            note(Finding(item.source, item.record, reason, "rejected", item.entity_id))
        else:
            known.add(item.entity_id)
            texts = _clean({"name": item.name, "attributes": item.attributes}, item, note)
            for name in (name for name, text in texts.items() if not text):
                note(Finding(item.source, item.record, f"empty {name}", "degraded", item.entity_id))
            yield replace(item, name=texts["name"], attributes=texts["attributes"])


def checked_mentions(
    items: Iterable[RawMention | Finding], row_of: Mapping[str, int], note: Note, ids: UniqueIds | None = None
) -> Iterator[RawMention]:
    """Mentions to keep, in release order. `note` takes the findings. `ids`: the same for all splits of a release.

    Rejected: text with lone surrogates, empty word, nil, null or unknown gold. Repaired: no id, one that is too long or
    has control characters (file and position make one), an id that came before (a number is put behind it), control
    characters (a space each). Degraded: a text that is too long (cut), groups that are too many or too long (left out),
    empty sentence.
    """
    ids = UniqueIds() if ids is None else ids
    for item in items:
        if isinstance(item, Finding):
            note(item)
            continue
        if not _is_text(item.word, item.sentence, item.gold or "", *_group_texts(item)):
            note(Finding(item.source, item.record, "broken text", "rejected", item.mention_id))
            continue
        # Findings on a mention that is rejected in the end would say nothing.
        findings: list[Finding] = []
        texts = _clean({"word": item.word, "sentence": item.sentence}, item, findings.append)
        if reason := _no_target(texts["word"], item.gold, row_of):
            note(Finding(item.source, item.record, reason, "rejected", item.gold or ""))
            continue
        mention_id = _mention_id(item, ids, findings.append)
        groups = _bounded_groups(item, findings.append)
        if not texts["sentence"]:
            findings.append(Finding(item.source, item.record, "empty sentence", "degraded", mention_id))
        for finding in findings:
            note(finding)
        yield replace(item, mention_id=mention_id, word=texts["word"], sentence=texts["sentence"], groups=groups)


def _entity_fault(item: RawEntity, known: set[str]) -> str | None:
    """Why an entity cannot be kept, or None."""
    if not _is_text(item.entity_id, item.name, item.attributes):
        return "broken text"
    if not item.entity_id:
        return "no entity id"
    if not _is_id(item.entity_id):
        return "unusable entity id"
    return "duplicate entity" if item.entity_id in known else None


def _no_target(word: str, gold: str | None, row_of: Mapping[str, int]) -> str | None:
    """Why a mention cannot be linked, or None."""
    if not word:
        return "empty word"
    if not gold:
        return "null gold"
    if gold.lower() == "nil":
        return "nil gold"
    return None if gold in row_of else "unknown gold"


def _clean(texts: Mapping[str, str], item: RawEntity | RawMention, note: Note) -> dict[str, str]:
    """Texts without control characters and of bounded length."""
    control = [name for name, text in texts.items() if _CONTROL.search(text)]
    if control:
        texts = {name: _CONTROL.sub(" ", text).strip() for name, text in texts.items()}
        note(Finding(item.source, item.record, "control characters", "repaired", ", ".join(control)))
    long = [name for name, text in texts.items() if len(text) > MAX_TEXT]
    if long:
        note(Finding(item.source, item.record, "text too long", "degraded", ", ".join(long)))
    return {name: text[:MAX_TEXT].strip() for name, text in texts.items()}


def _mention_id(item: RawMention, ids: UniqueIds, note: Note) -> str:
    wanted = item.mention_id
    if not (wanted and _is_id(wanted) and _is_text(wanted)):
        reason = "unusable mention id" if wanted else "no mention id"
        note(Finding(item.source, item.record, reason, "repaired", wanted))
        wanted = f"{Path(item.source).stem}-{item.record}"
    mention_id = ids.take(wanted)
    if mention_id != wanted:
        note(Finding(item.source, item.record, "duplicate mention id", "repaired", f"{wanted} -> {mention_id}"))
    return mention_id


def _bounded_groups(item: RawMention, note: Note) -> dict[str, str]:
    kept: dict[str, str] = {}
    unusable = []
    for name, value in sorted(item.groups.items()):
        too_long = len(name) > MAX_GROUP_NAME or len(value) > MAX_GROUP_VALUE
        if too_long or len(kept) == MAX_GROUPS or _CONTROL.search(name + value):
            unusable.append(name)
        else:
            kept[name] = value
    if unusable:
        note(Finding(item.source, item.record, "unusable groups", "degraded", ", ".join(unusable)))
    return kept


def _group_texts(item: RawMention) -> list[str]:
    return [text for pair in item.groups.items() for text in pair]


def _is_id(text: str) -> bool:
    return len(text) <= MAX_ID and not _CONTROL.search(text)


def _is_text(*texts: str) -> bool:
    """False where JSON escapes made lone surrogates, which no file can hold."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
