"""The layout for one's own data (docs/data.md has an example).

    entities.jsonl   {entity_id, name, attributes: text or {key: value}, images: [path, ...]}
    mentions.jsonl   {mention_id, word, sentence, entity_id or null, image: path, split, ...}
    images/  or images.zip

Either file may be a parquet file of the same columns. Paths are relative to the folder and stay in it. Further columns
of a mention become groups.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_prep.formats.fields import Types, groups_of, id_of, text_of, type_problem, without_wrong
from data_prep.formats.image_files import ImagePaths, file_of
from data_prep.formats.json_records import BrokenLine, line_records
from data_prep.formats.release import (
    OUTSIDE,
    Finding,
    KnowledgeBaseReader,
    Layout,
    RawEntity,
    RawImage,
    RawMention,
    ReleaseOptions,
    refuse_unknown_options,
)
from data_prep.formats.splits import SplitItem, grouped_split, split_choices
from dsmip.data.records import attribute_text, has_nested
from dsmip.errors import UserError

ENTITY_FILES = ("entities.jsonl", "entities.parquet")
_MENTION_FILES = ("mentions.jsonl", "mentions.parquet")
_ENTITY_TYPES: Types = {"entity_id": (str, int)}
_OPTIONAL_OF_ENTITIES: Types = {"name": str, "attributes": (str, dict), "images": list}
_MENTION_TYPES: Types = {"word": str, "entity_id": (str, int), "split": str}
_OPTIONAL_OF_MENTIONS: Types = {"mention_id": (str, int), "sentence": str, "image": str}
_SPLIT_OF = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("validation", "dev", "val", "valid"), "validation"),
}
_BATCH_ROWS = 256


class JsonlKb:
    """The knowledge base of this layout.

    Args:
        file: An entities.jsonl or entities.parquet; its images lie in its folder.
        options: Of the release; none of them counts.

    Attributes:
        images: The images of the folder.

    Raises:
        UserError: images.zip is damaged.
    """

    def __init__(self, file: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        self._file = file
        self.images = ImagePaths(file.parent)

    def files(self) -> list[tuple[str, Path]]:
        """The file, the zip, and every image that an entity names, by their names below the folder."""
        found = _image_files(image for item in self.entities() for image in _images(item))
        return _named(self._file.parent, [self._file, *self.images.zips, *found])

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the file, and findings, also those of the zip.

        Raises:
            UserError: Wrong parquet.
        """
        yield from self.images.refused
        source = self._file.name
        for position, record in enumerate(_records(self._file)):
            if isinstance(record, BrokenLine):
                yield Finding(source, position, "wrong JSON", "rejected", record.problem)
            elif problem := type_problem(record, _ENTITY_TYPES):
                yield Finding(source, position, "wrong type", "rejected", problem, id_of(record, "entity_id"))
            else:
                yield from self._entity(position, record)

    def _entity(self, position: int, record: Mapping[str, Any]) -> Iterator[RawEntity | Finding]:
        source, entity_id = self._file.name, text_of(record, "entity_id")
        record, problems = without_wrong(record, _OPTIONAL_OF_ENTITIES)
        if has_nested(record.get("attributes")):
            record = {**record, "attributes": None}
            problems = [*problems, "attributes holds more than texts and numbers"]
        for problem in problems:
            yield Finding(source, position, "wrong type", "degraded", problem, entity_id)
        images = []
        for name in filter(None, record.get("images") or []):
            if image := self.images.find(name):
                images.append(image)
            else:
                yield _outside(source, position, name, entity_id)
        attributes = attribute_text(record.get("attributes"))
        yield RawEntity(source, position, entity_id, text_of(record, "name"), attributes, tuple(images))

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Entity ids and records as they are, of all records that have an id."""
        for record in _records(self._file):
            if not isinstance(record, BrokenLine) and not type_problem(record, _ENTITY_TYPES):
                yield text_of(record, "entity_id"), record


class JsonlRelease:
    """A folder in the layout for one's own data.

    Args:
        folder: Where it lies.
        options: Their `split` counts: it takes the place of the mentions' own splits.

    Raises:
        UserError: A file is missing or there twice, images.zip is damaged, or an option is wrong or not of this layout.
    """

    layout: str = "jsonl"

    def __init__(self, folder: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        refuse_unknown_options(options, self.layout, ("split",))
        self.folder, self._options = folder, options
        self.choices: Mapping[str, str] = split_choices(options.split, options.seed) if options.split else {}
        self._kb = JsonlKb(_one_of(folder, ENTITY_FILES), options)
        self._mentions = _one_of(folder, _MENTION_FILES)

    @classmethod
    def fits(cls, folder: Path) -> bool:
        """Whether the folder has this layout's entities."""
        return any((folder / name).is_file() for name in ENTITY_FILES)

    def files(self) -> list[tuple[str, Path]]:
        """The two files, the zip, and every image that a record names."""
        records = (record for _, record in self._usable_records() if not isinstance(record, Finding))
        names = (text_of(record, "image") for record in records)
        found = _image_files(self._kb.images.find(name) for name in names if name)
        # An image may be an entity's and a mention's.
        return sorted({*self._kb.files(), *_named(self.folder, [self._mentions, *found])})

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the file; see `JsonlKb.entities`."""
        return self._kb.entities()

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions of a split in the order of the file; findings of records without a split come with train.

        Raises:
            UserError: Wrong parquet.
        """
        source = self._mentions.name
        for position, record in self._usable_records():
            if isinstance(record, Finding):
                if split == "train":
                    yield record
            elif self._split_of(position, record) == split:
                image, name = None, text_of(record, "image")
                if name and (image := self._kb.images.find(name)) is None:
                    yield _outside(source, position, name, text_of(record, "mention_id"))
                yield RawMention(
                    source,
                    position,
                    text_of(record, "mention_id"),
                    text_of(record, "word"),
                    text_of(record, "sentence"),
                    text_of(record, "entity_id") or None,
                    groups_of(record, _MENTION_TYPES.keys() | _OPTIONAL_OF_MENTIONS.keys()),
                    image,
                )

    def _split_of(self, position: int, record: Mapping[str, Any]) -> str:
        return self._grouped[position] if self._options.split else _SPLIT_OF[text_of(record, "split").lower()]

    @cached_property
    def _grouped(self) -> Mapping[int, str]:
        """The split of every mention, where it is cut by groups."""
        positions: list[int] = []

        def items() -> Iterator[SplitItem]:
            for position, record in self._usable_records():
                if not isinstance(record, Finding):
                    positions.append(position)
                    name = text_of(record, "image")
                    image = file_of(self._kb.images.find(name)) if name else None
                    yield SplitItem(text_of(record, "sentence"), image, 1)

        assert self._options.split
        splits = grouped_split(items(), self._options.split, self._options.seed)
        return dict(zip(positions, splits, strict=True))

    def _usable_records(self) -> Iterator[tuple[int, Any]]:
        """Positions and mentions; findings for each record that is none, and for wrong fields of others."""
        source = self._mentions.name
        for position, record in enumerate(_records(self._mentions)):
            record_id = id_of(record, "mention_id")
            if isinstance(record, BrokenLine):
                yield position, Finding(source, position, "wrong JSON", "rejected", record.problem)
            elif problem := type_problem(record, _MENTION_TYPES):
                yield position, Finding(source, position, "wrong type", "rejected", problem, record_id)
            elif (split := text_of(record, "split")).lower() not in _SPLIT_OF and not self._options.split:
                yield position, Finding(source, position, "unknown split", "rejected", split, record_id)
            else:
                record, problems = without_wrong(record, _OPTIONAL_OF_MENTIONS)
                for problem in problems:
                    yield position, Finding(source, position, "wrong type", "degraded", problem, record_id)
                yield position, record


def _outside(source: str, position: int, name: str, record_id: str) -> Finding:
    """The finding for an image whose path leads out of the folder."""
    return Finding(source, position, OUTSIDE, "degraded", name, record_id)


def _images(item: RawEntity | Finding) -> Sequence[RawImage]:
    return item.images if isinstance(item, RawEntity) else ()


def _image_files(images: Iterable[RawImage | None]) -> set[Path]:
    return {image.path for image in images if image and image.path}


def _named(folder: Path, paths: Iterable[Path]) -> list[tuple[str, Path]]:
    return sorted((path.relative_to(folder).as_posix(), path) for path in set(paths))


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    """The only file of some names."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        problem = "both are there; keep one" if found else "neither is there"
        raise UserError(f"{folder}: looked for {' or '.join(names)}: {problem}")
    return found[0]


def _records(path: Path) -> Iterator[Any]:
    """Records of either kind of file; memory holds a record, or a few hundred rows."""
    if path.suffix == ".jsonl":
        yield from line_records(path)
        return
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(_BATCH_ROWS):
                for record in batch.to_pylist():
                    # What pandas writes for an empty cell of a column of numbers.
                    yield {name: None if value != value else value for name, value in record.items()}
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}") from error


# After all others: its entities may be their knowledge base.
LAYOUT = Layout(
    JsonlRelease.layout,
    JsonlRelease,
    JsonlRelease.fits,
    dict.fromkeys(ENTITY_FILES, KnowledgeBaseReader(JsonlKb)),
    precedence=90,
    can_split=True,
)
