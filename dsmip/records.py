"""The two records that everything else is about: plain frozen data, pictures as encoded bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Entity:
    """One entry of the knowledge base.

    `images` holds encoded pictures (JPEG bytes) in release order; empty when the entity has none.
    """

    entity_row: int
    entity_id: str
    name: str
    attributes: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Mention:
    """One occurrence to be linked.

    `entity_id` / `entity_row` name the gold entity. `groups` (kind, source, topic ...) are for reports only and
    are never a model input. `image` is an encoded picture (JPEG bytes) or None.
    """

    mention_id: str
    word: str
    sentence: str
    entity_id: str
    entity_row: int
    groups: Mapping[str, str] = field(default_factory=dict)
    image: bytes | None = None
