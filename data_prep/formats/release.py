"""The contract of a layout: an open release, what it delivers, and what a user may choose of it.

A layout reads its files and checks types; `data_prep.build.rules` decides what is kept (docs/data.md tells users how).
Nothing is lost silently: every record that is left out, repaired or degraded leaves a `Finding`, and each one is either
yielded or rejected once, so that inputs = in shards + rejected.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from dsmip.errors import UserError

Action = Literal["rejected", "repaired", "degraded"]

_MAX_DETAIL = 200


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
