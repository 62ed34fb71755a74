"""The page of an inspection, which needs no other file: tables, sample records and examples with their images."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_prep.inspection.report import Example, Inspection
from data_prep.inspection.tables import tables
from dsmip.data.records import Entity, Mention
from dsmip.storage.atomic import write_text

_IMAGE_SIDE = 128
_IMAGE_QUALITY = 75
_TEXT_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class _Card:
    """A record as it is shown.

    Attributes:
        role: What it is in an example.
        title: Its word or name.
        text: Its sentence or attributes, cut.
        record_id: Its id.
        image: A data URI; "" when there is none, or none that can be decoded.
    """

    role: str
    title: str
    text: str
    record_id: str
    image: str


def write_page(found: Inspection, path: Path) -> None:
    """Writes the page to a file, whole or not at all."""
    environment = Environment(
        loader=PackageLoader("data_prep.inspection", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    examples: dict[str, list[tuple[str, list[_Card]]]] = {}
    for example in found.examples:
        examples.setdefault(example.title, []).append((example.split, _cards(example)))
    page = environment.get_template("page.html.j2").render(
        found=found,
        tables=tables(found),
        samples=[(example.split, _cards(example)) for example in found.samples],
        examples=examples,
    )
    write_text(path, page)


def _cards(example: Example) -> list[_Card]:
    return [_card(role, record) for role, record in example.records]


def _card(role: str, record: Mention | Entity) -> _Card:
    image: bytes | None
    if isinstance(record, Mention):
        image, title, text, record_id = record.image, record.word, record.sentence, record.mention_id
    else:
        image, title = next(iter(record.images), None), record.name
        text, record_id = record.attributes, record.entity_id
    text = text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}..."
    return _Card(role, title, text, record_id, _thumbnail(image) if image else "")


def _thumbnail(content: bytes) -> str:
    """A small JPEG as a data URI: the page stays small, and what the browser decodes was written here."""
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.draft("RGB", (2 * _IMAGE_SIDE, 2 * _IMAGE_SIDE))
            small = image.convert("RGB")
            small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
            small.save(buffer, "JPEG", quality=_IMAGE_QUALITY)
    except Exception:  # decoders raise whatever broken bytes lead them to
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
