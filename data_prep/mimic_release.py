"""Parser of the layout in which MIMIC's authors released WikiMEL, RichpediaMEL and WikiDiverse.

    kb_entity.json       [{qid, entity_name, attr, image_list: [file, ...]}, ...]
    <NAME>_train.json    [{id, sentence, mentions, answer, imgPath, ...}, ...]; likewise _dev and _test
    kb_image/  mention_image/ (or mention_images/: releases of both forms circulate)

`mentions` is the word, `answer` the gold qid. Scalar fields that the layout does not know become groups.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.json_records import array_records
from data_prep.picture_files import PictureFiles, base_name
from data_prep.release import Finding, RawEntity, RawMention, RawPicture, ReleaseOptions
from dsmip.errors import UserError

_KB_FILE = "kb_entity.json"
_KB_PICTURES, _MENTION_PICTURES = "kb_image", ("mention_image", "mention_images")
_SUFFIX = {"train": "_train.json", "validation": "_dev.json", "test": "_test.json"}
_MENTION_FIELDS = frozenset({"id", "sentence", "mentions", "entities", "imgPath", "answer"})


class MimicKb:
    """The knowledge base of the MIMIC layout: kb_entity.json, and the pictures beside it."""

    def __init__(self, file: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        self._file = file

    def files(self) -> list[tuple[str, Path]]:
        """The JSON file and the pictures, by their names below its folder."""
        paths = [self._file, *self._pictures.files()]
        return [(path.relative_to(self._file.parent).as_posix(), path) for path in paths]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of kb_entity.json."""
        path = self._file
        for position, record in enumerate(array_records(path)):
            problem = _type_problem(record, {"qid": str, "entity_name": str, "attr": str, "image_list": list})
            if problem:
                yield Finding(path.name, position, "wrong type", "rejected", problem)
                continue
            pictures = tuple(self._pictures.find(name, [name]) for name in record.get("image_list") or [] if name)
            text = {name: (record.get(name) or "").strip() for name in ("qid", "entity_name", "attr")}
            yield RawEntity(path.name, position, text["qid"], text["entity_name"], text["attr"], pictures)

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Qids and records, of all records that have a qid."""
        for record in array_records(self._file):
            if isinstance(record, dict) and isinstance(record.get("qid"), str):
                yield record["qid"].strip(), record

    @cached_property
    def _pictures(self) -> PictureFiles:
        return PictureFiles([self._file.parent / _KB_PICTURES])


class MimicRelease:
    """A folder in the MIMIC layout.

    Raises:
        UserError: the folder or one of its JSON files is missing, or it has two folders of mention pictures.
    """

    layout: str = "mimic"

    def __init__(self, folder: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        self.folder = folder
        self.choices: Mapping[str, str] = {}
        self._kb = MimicKb(folder / _KB_FILE, options)
        self._mention_folder = _mention_folder(folder)
        self._files = {split: _mention_file(folder, suffix) for split, suffix in _SUFFIX.items()}
        if not (folder / _KB_FILE).is_file():
            raise UserError(f"{folder}: looked for {_KB_FILE}, found {_listing(folder)}")

    @classmethod
    def fits(cls, folder: Path) -> bool:
        """Whether the folder has this layout's knowledge base."""
        return (folder / _KB_FILE).is_file()

    def files(self) -> list[tuple[str, Path]]:
        """The JSON files and all pictures."""
        paths = [*self._files.values(), *self._mention_pictures.files()]
        return [*self._kb.files(), *((path.relative_to(self.folder).as_posix(), path) for path in paths)]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of kb_entity.json."""
        return self._kb.entities()

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions in the order of the split's file."""
        path = self._files[split]
        for position, record in enumerate(array_records(path)):
            types: dict[str, type | tuple[type, ...]] = dict.fromkeys(_MENTION_FIELDS - {"id", "entities"}, str)
            problem = _type_problem(record, types | {"id": (str, int)})
            if problem:
                yield Finding(path.name, position, "wrong type", "rejected", problem)
                continue
            text = {name: (record.get(name) or "").strip() for name in types}
            yield RawMention(
                path.name,
                position,
                "" if record.get("id") is None else str(record["id"]).strip(),
                text["mentions"],
                text["sentence"],
                text["answer"] or None,
                _groups(record),
                self._mention_picture(text["imgPath"]),
            )

    def _mention_picture(self, name: str) -> RawPicture | None:
        """The release names the original upload; its file is a JPEG named by what comes before the first dot."""
        base = base_name(name)
        if not base:
            return None
        return self._mention_pictures.find(name, [base.split(".")[0] + ".jpg", base])

    @cached_property
    def _mention_pictures(self) -> PictureFiles:
        return PictureFiles([self._mention_folder])


def _mention_folder(folder: Path) -> Path:
    found = [folder / name for name in _MENTION_PICTURES if (folder / name).is_dir()]
    if len(found) > 1:
        names = " and ".join(f"{path.name}/" for path in found)
        raise UserError(f"{folder}: has both {names}; keep the one that holds the mentions' pictures")
    return found[0] if found else folder / _MENTION_PICTURES[0]


def _mention_file(folder: Path, suffix: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or _listing(folder)
        raise UserError(f"{folder}: looked for one file *{suffix}, found {names}")
    return found[0]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "an empty folder"


def _type_problem(record: Any, types: Mapping[str, type | tuple[type, ...]]) -> str:
    """What is wrong with a record's types, or an empty text. Absent and null are left to the rules of all releases."""
    if not isinstance(record, dict):
        return f"record is {type(record).__name__}"
    for name, expected in sorted(types.items()):
        value = record.get(name)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            return f"{name} is {type(value).__name__}"
    if any(not isinstance(name, str) for name in record.get("image_list") or []):
        return "image_list holds something else than names"
    return ""


def _groups(record: Mapping[str, Any]) -> dict[str, str]:
    scalars = (str, int, float, bool)
    unknown = {name: value for name, value in record.items() if name not in _MENTION_FIELDS}
    return {name: str(value) for name, value in sorted(unknown.items()) if isinstance(value, scalars)}
