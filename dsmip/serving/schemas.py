"""Requests and answers of the HTTP interface, as OpenAPI describes them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from dsmip.linking.links import Link, Links


class Body(BaseModel):
    """What a client sends: unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")


class MentionIn(Body):
    """A mention to link."""

    id: str = Field("", description="Comes back with the links.", max_length=1000)
    word: str = Field(description="The text that is to be linked.", examples=["Jaguar"])
    sentence: str = Field("", description="Where it stands.", examples=["A Jaguar crossed the river."])
    image: str | None = Field(None, description="Its picture: base64 of a file, a data: URL, or an allowed address.")
    desc: str = Field("", description="A description of the mention, for models that read one.")


class LinkRequest(Body):
    """One mention, or many under `mentions`."""

    mentions: list[MentionIn] = Field(min_length=1)
    top: int = Field(5, ge=1, description="How many entities each gets.")
    explain: bool = Field(False, description="Also what each expert or unit says of each link.")
    min_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Mentions that are less probably in the knowledge base count as not in it (`is_nil`).",
    )


class PartOut(BaseModel):
    """What one expert or unit of the system says of a link."""

    name: str
    score: float
    share: float = Field(description="Its score on a scale from its worst (0) to its best (1) of the mention's links.")


class LinkOut(BaseModel):
    """An entity that a mention may be linked to."""

    entity_id: str
    name: str
    attributes: str
    score: float = Field(
        description="Compares the entities of one mention only; behind a re-ranker's candidates it may rise again."
    )
    confidence: float | None = Field(
        description="Probability that this link is right; of the best one of a calibrated model."
    )
    expert: str | None = Field(description="Which expert scored it, where the system chooses one.")
    image: str = Field(description="Where its picture is, below the service's address; 404 there: it has none.")
    parts: list[PartOut] = Field(description="With `explain`; else empty.")


class LinksOut(BaseModel):
    """The links of one mention, best first."""

    id: str
    word: str
    is_nil: bool = Field(description="Taken for something that is not in the knowledge base.")
    known: float | None = Field(description="Probability that the mention's entity is in the knowledge base.")
    links: list[LinkOut]
    reason: str | None = Field(description="Why the mention could not be linked.")


class LinkResponse(BaseModel):
    """One item for each mention, in their order."""

    mentions: list[LinksOut]


class EntityOut(BaseModel):
    """An entity of the knowledge base."""

    entity_id: str
    name: str
    attributes: str
    image: str


class Problem(BaseModel):
    """Why a request was refused. field: which part of it, where it is one."""

    message: str
    field: str | None = None


class Unusable(ValueError):
    """A field of a request that cannot be used; the answer's status is 422, or 413 for what is too much."""

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.field, self.message, self.status = field, message, status


def json_object(text: str | bytes, field: str) -> dict[str, Any]:
    """The JSON object of a body or of a form's field.

    Raises:
        Unusable: It holds none, or halves of characters, which no answer could repeat.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Unusable(field, "is no JSON") from None
    if not isinstance(value, dict):
        raise Unusable(field, "is no JSON object")
    return value


def links_out(given_id: str, word: str, links: Links, min_confidence: float | None, *, explain: bool) -> LinksOut:
    """The answer for one mention."""
    parts = links.parts if explain else {}
    is_nil = links.is_nil if min_confidence is None or links.known is None else links.known < min_confidence
    return LinksOut(
        id=given_id,
        word=word,
        is_nil=is_nil,
        known=links.known,
        links=[link_out(link, parts_out(parts, number)) for number, link in enumerate(links)],
        reason=links.reason,
    )


def link_out(link: Link, parts: list[PartOut]) -> LinkOut:
    return LinkOut(
        entity_id=link.entity_id,
        name=link.name,
        attributes=link.attributes,
        score=link.score,
        confidence=link.confidence,
        expert=link.expert,
        image=image_address(link.entity_id),
        parts=parts,
    )


def parts_out(parts: Mapping[str, Sequence[float]], number: int) -> list[PartOut]:
    """What each part says of link `number`."""
    found = []
    for name, scores in parts.items():
        low, high = min(scores), max(scores)
        share = (scores[number] - low) / (high - low) if high > low else 1.0
        found.append(PartOut(name=name, score=scores[number], share=share))
    return found


def image_address(entity_id: str) -> str:
    """Where an entity's picture is, below the service's address."""
    return f"/entities/{quote(entity_id, safe='')}/image"


def first_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of pydantic's errors, without what was sent."""
    first = errors[0]
    where = ".".join(str(each) for each in first["loc"] if each != "body")
    return Problem(message=f"{where}: {first['msg']}" if where else str(first["msg"]), field=where or None)
