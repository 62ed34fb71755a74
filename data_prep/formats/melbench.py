"""The layout of MELBench's Richpedia-MEL and Wikidata-MEL: one file of all records, by key.

    Richpedia-MEL.json   {key: {id, sentence, mentions, entities, answer}, ...}
    Wikidata-MEL.json    the same with lists in mentions, entities and answer: one record, several mentions
    images/              (or image/, mention_image/, mention_images/, or a zip of that name) pictures, by record id
    splits.json          or train_ids.txt, dev_ids.txt, test_ids.txt: see data_prep.formats.splits

`mentions` is the word, `answer` the gold entity id, `entities` the gold's name (not used). From public material: the
fields and both forms are in the preparation code of the same group's GHMFC (there `id` is the picture's number in
KVQA, for Richpedia the qid, and keys of single mentions are id-0, id-1, ...); its samples have pictures named
<id>.jpg; MELBench's partition is 70/10/20 by its README, but its archives hold neither lists of it nor a knowledge
base; its authors have lost which pictures belong to the first Richpedia-MEL. Rules of our own: `imgPath`, where a
record has it, comes before the id; the file is any *-MEL.json, so that Weibo-MEL is read, too.

An input is a mention: a record of lists counts once for each; a record that cannot be read counts once.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.formats.fields import Types, groups_of, text_of, type_problem, without_wrong
from data_prep.formats.image_files import ImageFiles, file_of, folder_and_base
from data_prep.formats.json_records import object_records, opening
from data_prep.formats.registry import knowledge_base_file, open_knowledge_base
from data_prep.formats.release import (
    Finding,
    Layout,
    RawEntity,
    RawImage,
    RawMention,
    ReleaseOptions,
    refuse_unknown_options,
)
from data_prep.formats.splits import SplitFiles, SplitItem, grouped_split, split_choices
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError

_FILES = "*-MEL.json"
_IMAGES = ("images", "image", "mention_image", "mention_images")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".gif", ".webp")
_TEXTS = ("mentions", "entities", "answer")
_OPTIONAL: Types = {"id": (str, int), "sentence": str, "imgPath": str}
# What circulated copies add says nothing to report by.
_NO_GROUPS = frozenset({*_TEXTS, *_OPTIONAL, "candidates", "brief"})


class MelbenchRelease:
    """A folder with a *-MEL.json, with a split by files of ids or by `options.split`, which comes first.

    `options.split` cuts by groups of equal sentences and pictures (see `grouped_split`); by ids, a mention goes where
    its own id is listed or else its record's `id` or key. What is in no list is rejected.

    Args:
        folder: Where it lies.
        options: Which text of entities to read, where the knowledge base is, and the split.

    Raises:
        UserError: A file is missing, comes twice or is wrong, or an option is chosen that the layout does not have.
    """

    layout: str = "melbench"

    def __init__(self, folder: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        refuse_unknown_options(options, self.layout, ("entity_text", "kb", "split"))
        self.folder = folder
        self._file = _mention_file(folder)
        kb_file = knowledge_base_file(folder, options)
        self._kb = open_knowledge_base(kb_file, options)
        kb_name = options.kb.absolute().name if options.kb else kb_file.name
        self._options = options
        self._ids = SplitFiles(folder) if options.split is None else None
        self.choices: Mapping[str, str] = {"kb": kb_name, "entity_text": options.entity_text, **self._split_choices()}

    def _split_choices(self) -> dict[str, str]:
        if self._options.split is not None:
            return split_choices(self._options.split, self._options.seed)
        if self._ids is None or not self._ids.paths:
            raise UserError(
                f"{self.folder}: has no splits; pass --split 70/10/20, or put there splits.json or the lists "
                "train_ids.txt, dev_ids.txt and test_ids.txt"
            )
        return {"split": ", ".join(path.name for path in self._ids.paths)}

    @classmethod
    def fits(cls, folder: Path) -> bool:
        """Whether the folder has a file of that name that holds a JSON object."""
        return any(opening(path) == "{" for path in folder.glob(_FILES) if path.is_file())

    def files(self) -> list[tuple[str, Path]]:
        """The mentions, the files of ids if they are used, the images, and below kb/ the knowledge base."""
        paths = [self._file, *(self._ids.paths if self._ids else ()), *self._images.files()]
        return [
            *((path.relative_to(self.folder).as_posix(), path) for path in paths),
            *((f"kb/{name}", path) for name, path in self._kb.files()),
        ]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities of the knowledge base, in its order."""
        return self._kb.entities()

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions in the file's order. What belongs to no split comes with training's, as findings."""
        if split == SPLITS[0]:
            yield from self._images.refused
        for position, (key, record) in enumerate(object_records(self._file)):
            for item in self._read(position, key, record):
                own_split = None if isinstance(item, Finding) else self._split_of(item, key, record)
                if own_split == split:
                    yield item
                elif own_split is None and split == SPLITS[0]:
                    yield item if isinstance(item, Finding) else _in_no_split(item)

    def _split_of(self, mention: RawMention, key: str, record: Mapping[str, Any]) -> str | None:
        if self._ids is None:
            return self._grouped[mention.record]
        ids = (mention.mention_id, text_of(record, "id"), key)
        return next((self._ids.split_of[one] for one in ids if one in self._ids.split_of), None)

    @cached_property
    def _grouped(self) -> Mapping[int, str]:
        """The split of every record that has mentions, where it is cut by groups."""
        if self._options.split is None:
            return {}
        positions: list[int] = []
        splits = grouped_split(self._split_items(positions), self._options.split, self._options.seed)
        return dict(zip(positions, splits, strict=True))

    def _split_items(self, positions: list[int]) -> Iterator[SplitItem]:
        for position, (key, record) in enumerate(object_records(self._file)):
            mentions = [item for item in self._read(position, key, record) if isinstance(item, RawMention)]
            if mentions:
                positions.append(position)
                yield SplitItem(mentions[0].sentence, file_of(mentions[0].image), len(mentions))

    def _read(self, position: int, key: str, record: Any) -> Iterator[RawMention | Finding]:
        source = self._file.name
        if problem := _problem(record):
            yield Finding(source, position, "wrong type", "rejected", problem, key)
            return
        record, problems = without_wrong(record, _OPTIONAL)
        for problem in problems:
            yield Finding(source, position, "wrong type", "degraded", problem, key)
        lists = isinstance(record.get("mentions"), list)
        columns = {name: _column(record.get(name), lists) for name in _TEXTS}
        length = len(columns["mentions"])
        if any(len(column) != length for name, column in columns.items() if record.get(name) is not None):
            lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            yield Finding(source, position, "lists of different lengths", "rejected", lengths, key)
            return
        if not length:
            yield Finding(source, position, "no mentions", "rejected", key, key)
            return
        groups = groups_of(record, _NO_GROUPS)
        image = self._image(text_of(record, "imgPath"), text_of(record, "id") or key)
        words, golds = columns["mentions"], columns["answer"] or [None] * length
        for number, (word, gold) in enumerate(zip(words, golds, strict=True)):
            if not isinstance(word, str | None) or not isinstance(gold, str | None):
                yield Finding(source, position, "wrong type", "rejected", f"mention {number} of {key}", key)
                continue
            yield RawMention(
                source,
                position,
                f"{key}-{number}" if lists else key,
                (word or "").strip(),
                text_of(record, "sentence"),
                (gold or "").strip() or None,
                groups,
                image,
            )

    def _image(self, path: str, record_id: str) -> RawImage | None:
        """By its path, also as a JPEG, else by the id; None where nothing names a picture."""
        folder, base = folder_and_base(path)
        stem = base.split(".")[0]
        by_path = [folder + base, f"{folder}{stem}.jpg"] if stem else []
        if not by_path and not self._images.containers:
            return None
        return self._images.find(path or record_id, [*by_path, *(record_id + suffix for suffix in _SUFFIXES)])

    @cached_property
    def _images(self) -> ImageFiles:
        return ImageFiles([self.folder / (name + form) for name in _IMAGES for form in ("", ".zip")])


def _mention_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(path for path in folder.glob(_FILES) if path.is_file())
    if len(found) != 1:
        shown = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: looked for one file {_FILES}, found {shown}")
    return found[0]


def _in_no_split(mention: RawMention) -> Finding:
    return Finding(mention.source, mention.record, "in no split", "rejected", mention.mention_id, mention.mention_id)


def _problem(record: Any) -> str:
    """What is wrong with the types of a whole record, or an empty text. Absent and null are left to other rules."""
    if problem := type_problem(record, {}):
        return problem
    expected = (list if isinstance(record.get("mentions"), list) else str, type(None))
    wrong = [name for name in _TEXTS if not isinstance(record.get(name), expected)]
    return f"{wrong[0]} is {type(record[wrong[0]]).__name__}" if wrong else ""


def _column(value: Any, lists: bool) -> list[Any]:
    """A field as a list, one item a mention."""
    return (value or []) if lists else [value]


LAYOUT = Layout(MelbenchRelease.layout, MelbenchRelease, MelbenchRelease.fits, precedence=20, can_split=True)
