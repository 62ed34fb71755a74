"""Mentions and entities, plain frozen data with pictures as encoded bytes, and how they lie in a sample of a shard."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from dsmip.data.sampler import draw
from dsmip.data.tar import Fields, json_field
from dsmip.errors import UserError

Result = TypeVar("Result")
MAX_TEXT = 1 << 16  # characters; no model reads as much
MAX_ID = 256  # characters
NO_ROW = -1  # of a mention whose entity is not in the kb
ENTITY_SCHEMA = pa.schema(
    [
        ("entity_row", pa.int64()),
        ("entity_id", pa.string()),
        ("name", pa.string()),
        ("attributes", pa.string()),
        ("num_images", pa.int64()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("image_offsets", pa.list_(pa.int64())),
        ("image_sizes", pa.list_(pa.int64())),
    ]
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and line ends, which are white space


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

    `entity_id` / `entity_row` name the gold entity; a mention of something that is not in the knowledge base has the
    row -1, and as id what the release calls it, or nothing. `groups` (kind, source, topic ...) are for reports only and
    are never a model input. `image` is an encoded picture (JPEG bytes) or None. `desc` is a description that
    `dsmip enhance` has chosen for the mention without looking at its gold; empty where there is none.
    """

    mention_id: str
    word: str
    sentence: str
    entity_id: str
    entity_row: int
    groups: Mapping[str, str] = field(default_factory=dict)
    image: bytes | None = None
    desc: str = ""


def has_control(text: str) -> bool:
    """Whether a text has control characters other than white space."""
    return _CONTROL.search(text) is not None


def without_control(text: str) -> str:
    """The text with a space for each control character, stripped."""
    return _CONTROL.sub(" ", text).strip()


def is_text(*texts: str) -> bool:
    """False where JSON escapes made lone surrogates, which no file can hold."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_id(text: str) -> bool:
    """Whether a text may be an id: not too long, and without control characters."""
    return len(text) <= MAX_ID and not has_control(text)


def attribute_text(attributes: Any) -> str:
    """Attributes as a text; an object becomes "key: value. key: value, value.", empty values do not count."""
    if not isinstance(attributes, Mapping):
        return "" if attributes is None else str(attributes).strip()
    facts = []
    for key, value in attributes.items():
        values = [str(item).strip() for item in _items(value) if item is not None]
        if text := ", ".join(filter(None, values)):
            facts.append(f"{key}: {text.removesuffix('.')}.")
    return " ".join(facts)


def has_nested(attributes: Any) -> bool:
    """Whether attributes are an object that holds more than texts, numbers and lists of these."""
    values = attributes.values() if isinstance(attributes, Mapping) else ()
    return any(isinstance(item, Mapping | list) for value in values for item in _items(value))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def entity_fields(entity: Entity) -> dict[str, bytes]:
    """An entity: `json`, `0.jpg`, `1.jpg` ..."""
    record = {
        "entity_row": entity.entity_row,
        "entity_id": entity.entity_id,
        "name": entity.name,
        "attributes": entity.attributes,
        "num_images": len(entity.images),
    }
    return {"json": json_field(record)} | {f"{number}.jpg": image for number, image in enumerate(entity.images)}


def mention_fields(mention: Mention, entity: Entity | None) -> dict[str, bytes]:
    """A mention with its gold entity, if any: `json`, `jpg` (absent: no picture), `entity.json`, `entity.0.jpg` ..."""
    record = {
        "mention_id": mention.mention_id,
        "word": mention.word,
        "sentence": mention.sentence,
        "entity_id": mention.entity_id,
        "entity_row": mention.entity_row,
        "groups": dict(mention.groups),
        **described(mention.desc),
    }
    fields = {"json": json_field(record)}
    if mention.image is not None:
        fields["jpg"] = mention.image
    if entity is None:
        return fields
    return fields | {f"entity.{field}": content for field, content in entity_fields(entity).items()}


def described(desc: str) -> dict[str, str]:
    """The description's field in a mention's record; none where there is no description."""
    return {"desc": desc} if desc else {}


def read_mention(fields: Fields, source: str) -> Mention:
    """The mention of a sample; `source` names its shard and key in errors.

    Raises:
        UserError: the sample is not what `mention_fields` makes.
    """
    return _checked(source, lambda: Mention(**_object(fields["json"]), image=fields.get("jpg")))


def read_pair(fields: Fields, source: str, *label: str | int) -> tuple[Mention, Entity]:
    """The mention of a sample and its gold entity with one of its pictures, drawn by (label, mention_id).

    Raises:
        UserError: the sample is not what `mention_fields` makes.
    """
    mention = read_mention(fields, source)
    return mention, _checked(source, lambda: _entity_with_one_image(fields, (*label, mention.mention_id)))


def read_gold(fields: Fields, source: str) -> Entity:
    """The gold entity of a sample, without its pictures.

    Raises:
        UserError: the sample is not what `mention_fields` makes.
    """
    return _checked(source, lambda: make_entity(_object(fields["entity.json"]), ()))


def make_entity(record: Mapping[str, Any], images: tuple[bytes, ...]) -> Entity:
    """An entity from a JSON object or a parquet row."""
    return Entity(record["entity_row"], record["entity_id"], record["name"], record["attributes"], images)


def _entity_with_one_image(fields: Fields, label: tuple[str | int, ...]) -> Entity:
    record = _object(fields["entity.json"])
    if not record["num_images"]:
        return make_entity(record, ())
    number = draw(record["num_images"], "picture", *label)
    return make_entity(record, (fields[f"entity.{number}.jpg"],))


def _object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("a record is not an object")
    return value


def _checked(source: str, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: a sample is not as it was written ({error}); prepare the dataset again") from error
