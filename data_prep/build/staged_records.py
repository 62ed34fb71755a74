"""Checked records on their way from the release to a shard: a line of ASCII JSON each, pictures by their place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from data_prep.formats.release import RawEntity, RawMention, RawPicture


def write_entity(stream: TextIO, raw: RawEntity) -> int:
    """Adds a line; its length."""
    pictures = [*map(_picture_line, raw.pictures)]
    return _write(stream, [raw.source, raw.record, raw.entity_id, raw.name, raw.attributes, pictures])


def write_mention(stream: TextIO, raw: RawMention, gold_row: int) -> int:
    """Adds a line; its length. gold_row: the kb row of the gold."""
    picture = _picture_line(raw.picture) if raw.picture else None
    text = [raw.mention_id, raw.word, raw.sentence, raw.gold, dict(raw.groups)]
    return _write(stream, [raw.source, raw.record, *text, picture, gold_row])


def read_entities(path: Path) -> Iterator[RawEntity]:
    """What `write_entity` wrote."""
    for source, record, entity_id, name, attributes, pictures in _lines(path):
        yield RawEntity(source, record, entity_id, name, attributes, tuple(map(_picture, pictures)))


def read_mentions(path: Path) -> Iterator[tuple[RawMention, int]]:
    """What `write_mention` wrote: mentions, each with its gold's kb row."""
    for source, record, mention_id, word, sentence, gold, groups, picture, row in _lines(path):
        yield RawMention(source, record, mention_id, word, sentence, gold, groups, picture and _picture(picture)), row


def _write(stream: TextIO, value: list[Any]) -> int:
    # The files are opened as ASCII, so that characters are bytes.
    return stream.write(json.dumps(value) + "\n")


def _lines(path: Path) -> Iterator[list[Any]]:
    with path.open(encoding="ascii") as stream:
        yield from map(json.loads, stream)


def _picture_line(raw: RawPicture) -> list[Any]:
    # Absolute: who builds the shard may work in another folder.
    return [raw.name, str(raw.path.absolute()) if raw.path else None, raw.member, raw.size]


def _picture(line: list[Any]) -> RawPicture:
    name, path, member, size = line
    return RawPicture(name, Path(path) if path else None, member, size)
