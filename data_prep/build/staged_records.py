"""Checked records on their way from the release to a shard: a line of ASCII JSON each, images by path."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from data_prep.formats.release import RawEntity, RawImage, RawMention


def write_entity(stream: TextIO, raw: RawEntity) -> int:
    """Adds a line and returns its length in bytes."""
    images = [*map(_image_fields, raw.images)]
    return _write(stream, [raw.source, raw.record, raw.entity_id, raw.name, raw.attributes, images])


def write_mention(stream: TextIO, raw: RawMention, gold_row: int) -> int:
    """Adds a line with the kb row of the mention's gold, and returns its length in bytes."""
    image = _image_fields(raw.image) if raw.image else None
    text = [raw.mention_id, raw.word, raw.sentence, raw.gold, dict(raw.groups)]
    return _write(stream, [raw.source, raw.record, *text, image, gold_row])


def read_entities(path: Path) -> Iterator[RawEntity]:
    """The entities that `write_entity` wrote."""
    for source, record, entity_id, name, attributes, images in _lines(path):
        yield RawEntity(source, record, entity_id, name, attributes, tuple(map(_image, images)))


def read_mentions(path: Path) -> Iterator[tuple[RawMention, int]]:
    """The mentions that `write_mention` wrote, each with its gold's kb row."""
    for source, record, mention_id, word, sentence, gold, groups, image, row in _lines(path):
        yield RawMention(source, record, mention_id, word, sentence, gold, groups, image and _image(image)), row


def _write(stream: TextIO, value: list[Any]) -> int:
    # The files are opened as ASCII, so that characters are bytes.
    return stream.write(json.dumps(value) + "\n")


def _lines(path: Path) -> Iterator[list[Any]]:
    with path.open(encoding="ascii") as stream:
        yield from map(json.loads, stream)


def _image_fields(raw: RawImage) -> list[Any]:
    # Absolute: who builds the shard may work in another folder.
    return [raw.name, str(raw.path.absolute()) if raw.path else None, raw.member, raw.size, raw.fits]


def _image(fields: list[Any]) -> RawImage:
    name, path, member, size, fits = fields
    return RawImage(name, Path(path) if path else None, member, size, fits)
