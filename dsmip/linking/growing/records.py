"""Entities as users give them: checked, cleaned and with prepared pictures, as `dsmip prepare` makes them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmip.data.manifest import ImageSettings
from dsmip.data.records import Entity, attribute_text, has_nested, is_id, is_text
from dsmip.errors import UserError
from dsmip.linking.mentions import ImageReader, Unreadable, given_text, kind_of, records


@dataclass(frozen=True, slots=True)
class GivenEntity:
    """A record of an entity, or an id alone.

    Attributes:
        where: It stands, for messages: "record 3", "entities.jsonl: line 4".
        record: It, or why it is none.
    """

    where: str
    record: Any


def given_entities(given: Iterable[Any]) -> Iterator[GivenEntity]:
    """One by one: of a list, an Arrow table or a pandas frame; those that say where they stand keep that.

    Raises:
        UserError: It is a single record, or nothing to iterate.
    """
    if isinstance(given, Mapping | Entity | str | bytes) or not (
        isinstance(given, Iterable) or hasattr(given, "to_batches")
    ):
        raise UserError(f"entities: {kind_of(given)}; give a list of them")
    for number, each in enumerate(records(given)):
        yield each if isinstance(each, GivenEntity) else GivenEntity(f"record {number}", each)


class EntityReader:
    """Makes entities of what users give.

    Args:
        settings: How the knowledge base's pictures were prepared.
        folder: Where relative paths of pictures start, and which they must not leave; None: the present folder, and
            any path will do.
    """

    def __init__(self, settings: ImageSettings, folder: Path | None = None) -> None:
        self._folder, self._images = folder, ImageReader(settings, folder, field="images")

    def id_of(self, given: GivenEntity) -> str:
        """The id of a record, or the id that it is.

        Raises:
            UserError: There is none; the message says where.
        """
        record = given.record
        if isinstance(record, Unreadable):
            raise UserError(f"{given.where}: {record.reason}")
        if isinstance(record, Entity):
            record = record.entity_id
        value = record.get("entity_id") if isinstance(record, Mapping) else record
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise UserError(f"{given.where}: no entity_id (a text or a whole number)")
        entity_id = str(value).strip()
        if not entity_id or not is_text(entity_id) or not is_id(entity_id):
            raise UserError(f"{given.where}: entity_id {entity_id[:80]!a} is empty, too long or no text")
        return entity_id

    def read(self, given: GivenEntity) -> Entity:
        """An entity with its first picture; its row is not known yet.

        A record is a `dsmip.Entity`, or has entity_id, name, attributes (a text, or texts and numbers by key) and
        images (a path, or a list of them; or pictures as `Linker.link` takes them). Other keys do not count.

        Raises:
            UserError: It is none, has no name, or its first picture cannot be read; the message says where and which.
        """
        entity_id, record = self.id_of(given), given.record
        if isinstance(record, Entity):
            record = {name: getattr(record, name) for name in ("name", "attributes", "images")}
        try:
            if not isinstance(record, Mapping):
                raise UserError(f"an entity is an object with entity_id and name; got {kind_of(record)}")
            return self._entity(entity_id, record)
        except UserError as error:
            raise UserError(f"{given.where}: {entity_id}: {error}") from None

    def _entity(self, entity_id: str, record: Mapping[str, Any]) -> Entity:
        name, attributes = given_text("name", record.get("name")), record.get("attributes")
        if not name:
            raise UserError("name: empty; an entity needs one")
        if has_nested(attributes):
            raise UserError("attributes: more than texts and numbers; give a text, or one by key")
        if isinstance(attributes, Mapping):
            attributes = attribute_text(attributes)
        if "image" in record:
            raise UserError("image: an entity's pictures are called images")
        given = record.get("images")
        if isinstance(given, list | tuple):
            given = next((each for each in given if each is not None and each != ""), None)
        self._check_inside(given)
        image = self._images.read(given)
        images = () if image is None else (image,)
        return Entity(-1, entity_id, name, given_text("attributes", attributes), images)

    def _check_inside(self, given: Any) -> None:
        if self._folder is None or not isinstance(given, str | Path):
            return
        folder = self._folder.resolve()
        if not (folder / given).resolve().is_relative_to(folder):
            raise UserError(f"images {given}: outside the folder of the file")
