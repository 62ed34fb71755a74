"""Links of a mention, best first, with cards of them for notebooks."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any, overload

from dsmip.data.records import Mention
from dsmip.linking.knowledge_base import KnowledgeBase

_CARD = "border:1px solid #8886;border-radius:6px;padding:8px;width:180px;overflow:hidden;overflow-wrap:anywhere"
_IMAGE = "max-width:100%;max-height:120px;display:block;margin:0 auto 6px"
_MOST_ATTRIBUTES = 240  # characters on a card


@dataclass(frozen=True, slots=True)
class Link:
    """An entity that a mention may be linked to.

    Attributes:
        entity_id: Of the knowledge base.
        entity_row: Its row there.
        name: Its name.
        attributes: Its text.
        score: Higher is better; comparable for one mention (and one expert) only. As `dsmip evaluate` has it. Of a
            system that re-ranks, the first k have the re-ranker's, those behind the first stage's: it may rise there.
        confidence: The probability that this link is right, of the best link of a calibrated model; else None.
        expert: Which one scored it, of a system that chooses; else None.
    """

    entity_id: str
    entity_row: int
    name: str
    attributes: str
    score: float
    confidence: float | None = None
    expert: str | None = None


@dataclass(frozen=True)
class Links(Sequence[Link]):
    """The links of a mention, best first: a sequence, with cards in a notebook.

    Attributes:
        mention: As it was linked: texts cleaned, the picture prepared.
        links: Best first, equal scores by row in the knowledge base; none where there is a `reason`.
        is_nil: The model is calibrated and takes the mention for one of something that is not in the knowledge base.
            The links are what it would be otherwise. False where nothing is calibrated.
        known: The probability that the mention's entity is in the knowledge base; None where nothing is calibrated.
        parts: By expert or unit, its score of each link, where `explain` was asked for; of fused experts the logarithms
            of probabilities.
        reason: Why the mention could not be linked (`Linker.link_many` with `on_error="report"`); else None.
    """

    mention: Mention
    links: tuple[Link, ...]
    is_nil: bool = False
    known: float | None = None
    reason: str | None = None
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    knowledge_base: KnowledgeBase | None = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> Link | None:
        """The best link; None where the mention is nil or could not be linked."""
        return self.links[0] if self.links and not self.is_nil else None

    @overload
    def __getitem__(self, index: int) -> Link: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Link]: ...

    def __getitem__(self, index: int | slice) -> Link | Sequence[Link]:
        return self.links[index]

    def __len__(self) -> int:
        return len(self.links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links)

    def first(self, top: int) -> "Links":
        """With the best `top` links."""
        parts = {name: scores[:top] for name, scores in self.parts.items()}
        return replace(self, links=self.links[:top], parts=parts)

    def as_dict(self) -> dict[str, Any]:
        """All of it but the picture, in values that JSON has."""
        return {
            "mention_id": self.mention.mention_id,
            "word": self.mention.word,
            "sentence": self.mention.sentence,
            "has_image": self.mention.image is not None,
            "is_nil": self.is_nil,
            "known": self.known,
            "reason": self.reason,
            "links": [asdict(link) for link in self.links],
        }

    def html(self) -> str:
        """Cards of the mention and its links, with their pictures; everything in them is escaped."""
        state = self.reason or ("not in the knowledge base" if self.is_nil else "")
        own = _card(self.mention.word, self.mention.sentence, state, self.mention.image)
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{own}{"".join(map(self._card_of, self.links))}</div>'

    def _repr_html_(self) -> str:
        """As a notebook asks for it."""
        return self.html()

    def _card_of(self, link: Link) -> str:
        figures = [f"{link.score:.4g}"]
        if link.confidence is not None:
            figures.append(f"{link.confidence:.0%} sure")
        if link.expert is not None:
            figures.append(link.expert)
        image = self.knowledge_base.image(link.entity_row) if self.knowledge_base else None
        return _card(f"{link.name} ({link.entity_id})", link.attributes, " · ".join(figures), image)


def _card(title: str, text: str, figures: str, image: bytes | None) -> str:
    shown = text if len(text) <= _MOST_ATTRIBUTES else f"{text[:_MOST_ATTRIBUTES]} …"
    src = "" if image is None else f'<img alt="" style="{_IMAGE}" src="{image_address(image)}">'
    return (
        f'<div style="{_CARD}">{src}<b>{escape(title)}</b><br><small>{escape(figures)}</small>'
        f"<br><small>{escape(shown)}</small></div>"
    )


def image_address(image: bytes) -> str:
    """A `data:` address of a prepared (JPEG) picture."""
    return f"data:image/jpeg;base64,{b64encode(image).decode()}"
