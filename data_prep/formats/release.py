"""The contract of a layout: how it is declared, what an open release delivers, what a user may choose of it.

A layout reads its files and checks types; `data_prep.build.rules` decides what is kept (docs/data.md tells users how).
Nothing is lost silently: every record that is left out, repaired or degraded leaves a `Finding`, and each one is either
yielded or rejected once, so that inputs = in shards + rejected.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dsmip.errors import UserError

OUTSIDE = "picture outside the folder"  # the reason of a finding
Action = Literal["rejected", "repaired", "degraded"]

_MAX_DETAIL = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """A record that was touched.

    Whatever a release holds, a finding can be written: lone surrogates become "?", a long detail is cut.

    Attributes:
        source: Name of the file.
        record: Position of the record there.
        reason: What was wrong, in a few words that are counted.
        action: What was done about it.
        detail: What it was about: an id, a name, a field.
        id: The entity's or mention's id, where the record has one.
    """

    source: str
    record: int
    reason: str
    action: Action
    detail: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        for name, text in (("source", self.source), ("detail", _cut(self.detail)), ("id", _cut(self.id))):
            object.__setattr__(self, name, text.encode("utf-8", "replace").decode())


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL else text[: _MAX_DETAIL - 1] + "…"


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image that a record names.

    Attributes:
        name: What the record calls it.
        path: The file that was found for it; None: lost.
        member: Its name in the zip `path`; None: `path` is a plain file.
        size: Bytes, as stored outside of the zip.
        fits: Of an image that is lost because its name fits several files: what these are.
    """

    name: str
    path: Path | None
    member: str | None = None
    size: int = 0
    fits: str = ""


@dataclass(frozen=True, slots=True)
class RawEntity:
    """An entity of a release.

    Attributes:
        source: Name of the file that it stands in.
        record: Position there.
        entity_id: Its id, as mentions name it.
        name: Its name.
        attributes: Its text.
        images: The images that the record names, also those that are lost.
    """

    source: str
    record: int
    entity_id: str
    name: str
    attributes: str
    images: tuple[RawImage, ...] = ()


@dataclass(frozen=True, slots=True)
class RawMention:
    """A mention of a release.

    Attributes:
        source: Name of the file that it stands in.
        record: Position there.
        mention_id: Its id, or "" where it has none.
        word: The word to link.
        sentence: The sentence around it.
        gold: Id of the entity that it means; None where the release has none.
        groups: Values to report by, by name.
        image: Its image, if the record names one.
    """

    source: str
    record: int
    mention_id: str
    word: str
    sentence: str
    gold: str | None
    groups: Mapping[str, str] = field(default_factory=dict)
    image: RawImage | None = None


@dataclass(frozen=True, slots=True)
class ReleaseOptions:
    """What a user chose of a release; a layout refuses what it does not have.

    Attributes:
        entity_text: Field of the attributes.
        mention_text: What the sentence is made of.
        kb: Where the knowledge base is, for layouts without one.
        split: Percentages of train, validation and test, for layouts without splits.
        seed: Orders the groups of `split`.
    """

    entity_text: Literal["attr", "desc"] = "attr"
    mention_text: Literal["sentence", "sentence+desc"] = "sentence"
    kb: Path | None = None
    split: tuple[int, int, int] | None = None
    seed: int = 0


class Release(Protocol):
    """A raw release on disk.

    Attributes:
        folder: Where it lies; its name goes into the manifest.
        layout: Name of the layout.
        choices: What was chosen of the release (which text, which split); goes into the manifest.
    """

    folder: Path
    layout: str
    choices: Mapping[str, str]

    def files(self) -> Sequence[tuple[str, Path]]:
        """Every file that a dataset made from this release depends on, under a name that is the same everywhere."""

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in release order, and findings of records that could not be read."""

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions of "train", "validation" or "test" in release order, and findings of records without any."""


class KnowledgeBase(Protocol):
    """The entities of a layout, without its mentions."""

    def files(self) -> Sequence[tuple[str, Path]]:
        """Every file that they are made from, under its name in its folder."""

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the file, and findings of records that could not be read."""

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Entity ids and records as they are, of all records that have an id."""


@dataclass(frozen=True, slots=True)
class KnowledgeBaseReader:
    """How a file is read that is a knowledge base.

    Attributes:
        open: Opens it.
        has_descriptions: Whether `ReleaseOptions.entity_text` may be "desc".
    """

    open: Callable[[Path, ReleaseOptions], KnowledgeBase]
    has_descriptions: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """How a release lies in its folder. A module of this package declares its own as `LAYOUT`.

    Attributes:
        name: What `--format` calls it.
        open: Opens a folder, or refuses it as the user's mistake: where something is missing or wrong, or an option is
            set that the layout does not have.
        fits: Whether a folder looks like it, by a quick look.
        knowledge_bases: Readers of its entities by file name, for layouts that have none of their own.
        precedence: Of several layouts that fit a folder the one of the lowest precedence is taken.
        can_split: Whether `ReleaseOptions.split` may be set.
    """

    name: str
    open: Callable[[Path, ReleaseOptions], Release]
    fits: Callable[[Path], bool]
    knowledge_bases: Mapping[str, KnowledgeBaseReader] = field(default_factory=dict)
    precedence: int = 50
    can_split: bool = False


def refuse_unknown_options(options: ReleaseOptions, layout: str, known: Sequence[str]) -> None:
    """Checks that only options are set that a layout has.

    Args:
        options: What was chosen.
        layout: Name of the layout.
        known: Names of the options that it has.

    Raises:
        UserError: Another one is set.
    """
    for name in ("entity_text", "mention_text", "kb", "split"):
        if name not in known and getattr(options, name) != getattr(ReleaseOptions(), name):
            raise UserError(f"--{name.replace('_', '-')}: the layout {layout} has no such choice; leave it out")
