"""The layout in which MIMIC's authors released WikiMEL, RichpediaMEL and WikiDiverse.

    kb_entity.json       [{id, qid, entity_name, attr, image_list: [file, ...], desc?, ...}, ...]
    qid2id.json          {qid: id}; may be absent
    <NAME>_train.json    [{id, sentence, mentions, answer, imgPath, desc?, ...}, ...]; likewise _dev and _test
    kb_image/  mention_image/ (or mention_images/: releases of both forms circulate), each also as a zip

`mentions` is the word, `answer` the gold qid or "nil"; names and words may be percent-encoded. Scalar fields that the
layout does not know become groups. Rows of a dataset are the order of kb_entity.json; `id` and qid2id.json say the same
in a sound release and are only compared.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.formats.fields import (
    ChosenField,
    Types,
    groups_of,
    id_of,
    percent_decoded,
    text_of,
    type_problem,
    without_wrong,
)
from data_prep.formats.image_files import ImageFiles, folder_and_base
from data_prep.formats.json_records import array_records, object_records
from data_prep.formats.release import (
    Finding,
    KnowledgeBaseReader,
    Layout,
    RawEntity,
    RawImage,
    RawMention,
    ReleaseOptions,
    refuse_unknown_options,
)
from dsmip.errors import UserError

KB_FILE = "kb_entity.json"
_ROWS_FILE = "qid2id.json"


class MimicKb:
    """The knowledge base of this layout.

    Args:
        file: A kb_entity.json; its images lie beside it, in the folder kb_image or in kb_image.zip.
        options: Their `entity_text` counts.
    """

    def __init__(self, file: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        self._file, self._text = file, options.entity_text
        self._rows_file = file.with_name(_ROWS_FILE)

    def files(self) -> list[tuple[str, Path]]:
        """The JSON files and what the images are in, by their names below the folder."""
        paths = [self._file, *[self._rows_file] * self._rows_file.is_file(), *self._images.files()]
        return [(path.relative_to(self._file.parent).as_posix(), path) for path in paths]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the list, and findings, also those of the images' zip.

        Raises:
            UserError: Wrong JSON; no record has the text that was chosen; qid2id.json agrees with no record.
        """
        yield from self._images.refused
        rows = _Rows(self._rows_file, self._file)
        text = ChosenField(self._file, self._text) if self._text == "desc" else None
        source, optional = self._file.name, {"entity_name": str, self._text: str, "image_list": list}
        for position, record in enumerate(array_records(self._file)):
            if problem := type_problem(record, {"qid": str}):
                yield Finding(source, position, "wrong type", "rejected", problem, id_of(record, "qid"))
                continue
            record, problems = without_wrong(record, optional)
            for problem in problems:
                yield Finding(source, position, "wrong type", "degraded", problem, text_of(record, "qid"))
            if text:
                yield from text.findings(position, record, text_of(record, "qid"))
            qid, name, attributes = (text_of(record, field) for field in ("qid", "entity_name", self._text))
            yield from rows.findings(position, qid, record.get("id"))
            images = tuple(self._images.find(file, [file]) for file in record.get("image_list") or [] if file)
            yield RawEntity(source, position, qid, percent_decoded(name).strip(), attributes, images)
        if text:
            text.finish()
        yield from rows.finish()

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Qids and records as they are, of all records that have a qid."""
        for record in array_records(self._file):
            if isinstance(record, dict) and isinstance(record.get("qid"), str):
                yield record["qid"].strip(), record

    @cached_property
    def _images(self) -> ImageFiles:
        return ImageFiles([self._file.parent / "kb_image", self._file.parent / "kb_image.zip"])


class _Rows:
    """Compares `id` and qid2id.json with the order of the list; nothing depends on them, so all is repaired."""

    def __init__(self, path: Path, kb: Path) -> None:
        self._path, self._kb = path, kb
        self._row_of: dict[str, Any] = dict(object_records(path)) if path.is_file() else {}
        self._left = dict.fromkeys(self._row_of)
        self._compared = self._agreed = 0

    def findings(self, position: int, qid: str, record_id: object) -> Iterator[Finding]:
        """What is wrong with the numbers of one record."""
        if record_id is not None and record_id != position:
            yield Finding(self._kb.name, position, "non-contiguous id", "repaired", f"{qid}: {record_id}", qid)
        if not self._row_of or not qid:
            return
        self._left.pop(qid, None)
        self._compared += 1
        row = self._row_of.get(qid)
        if row is not None and row == (position if record_id is None else record_id):
            self._agreed += 1
        else:
            said = "is not in it" if row is None else f"is {row} there"
            yield Finding(self._kb.name, position, f"{_ROWS_FILE} disagrees", "repaired", f"{qid} {said}", qid)

    def finish(self) -> Iterator[Finding]:
        """What the file has and the list has not.

        Raises:
            UserError: The file is another release's.
        """
        if self._compared and not self._agreed:
            raise UserError(
                f"{self._path}: agrees with no record of {self._kb.name}; bring the one of this release or remove it "
                "(the order of the list says the same)"
            )
        for position, qid in enumerate(self._row_of):
            if qid in self._left:
                yield Finding(self._path.name, position, f"not in {self._kb.name}", "repaired", qid, qid)


_MENTION_IMAGES = ("mention_image", "mention_images")
_SUFFIX = {"train": "_train.json", "validation": "_dev.json", "test": "_test.json"}
_MENTION_TYPES: Types = {"mentions": str, "answer": str}
_OPTIONAL: Types = {"id": (str, int), "sentence": str, "imgPath": str}
# The gold's name, texts, and what releases with negatives add: nothing to report by.
_NO_GROUPS = frozenset({"entities", "desc", "instance", "type", "negative"})


class MimicRelease:
    """A folder in the MIMIC layout.

    Args:
        folder: Where it lies.
        options: Which texts to read.

    Raises:
        UserError: The folder or one of its JSON files is missing, it has two folders of mention images, or an option
            is set that this layout does not have.
    """

    layout: str = "mimic"

    def __init__(self, folder: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        refuse_unknown_options(options, self.layout, ("entity_text", "mention_text"))
        self.folder = folder
        self.choices: Mapping[str, str] = {"entity_text": options.entity_text, "mention_text": options.mention_text}
        self._with_desc = options.mention_text == "sentence+desc"
        self._image_folders = _image_folders(folder)
        self._files = {split: _mention_file(folder, suffix) for split, suffix in _SUFFIX.items()}
        if not (folder / KB_FILE).is_file():
            raise UserError(f"{folder}: looked for {KB_FILE}, found {_listing(folder)}")
        self._kb = MimicKb(folder / KB_FILE, options)

    @classmethod
    def fits(cls, folder: Path) -> bool:
        """Whether the folder has this layout's knowledge base and mentions."""
        return (folder / KB_FILE).is_file() and any(folder.glob(f"*{_SUFFIX['train']}"))

    def files(self) -> list[tuple[str, Path]]:
        """The JSON files and what the images are in: a zip, or all files of a folder."""
        paths = [*self._files.values(), *self._mention_images.files()]
        return [*self._kb.files(), *((path.relative_to(self.folder).as_posix(), path) for path in paths)]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of kb_entity.json; see `MimicKb.entities`."""
        return self._kb.entities()

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions in the order of the split's file; those of train come with the findings of the images' zip.

        Raises:
            UserError: Wrong JSON, or no record has the text that was chosen.
        """
        if split == "train":
            yield from self._mention_images.refused
        path = self._files[split]
        desc = ChosenField(path, "desc") if self._with_desc else None
        optional = {**_OPTIONAL, "desc": str} if desc else _OPTIONAL
        for position, record in enumerate(array_records(path)):
            if problem := type_problem(record, _MENTION_TYPES):
                yield Finding(path.name, position, "wrong type", "rejected", problem, id_of(record, "id"))
                continue
            record, problems = without_wrong(record, optional)
            for problem in problems:
                yield Finding(path.name, position, "wrong type", "degraded", problem, text_of(record, "id"))
            if desc:
                yield from desc.findings(position, record, text_of(record, "id"))
            yield self._mention(path.name, position, record)
        if desc:
            desc.finish()

    def _mention(self, source: str, position: int, record: Mapping[str, Any]) -> RawMention:
        sentence = text_of(record, "sentence")
        if self._with_desc:
            sentence = f"{sentence} {text_of(record, 'desc')}".strip()
        return RawMention(
            source,
            position,
            text_of(record, "id"),
            percent_decoded(text_of(record, "mentions")).strip(),
            sentence,
            text_of(record, "answer") or None,
            groups_of(record, _NO_GROUPS | _MENTION_TYPES.keys() | _OPTIONAL.keys()),
            self._mention_image(text_of(record, "imgPath")),
        )

    def _mention_image(self, name: str) -> RawImage | None:
        """The release names the original upload; its file is a JPEG named by what comes before the first dot."""
        folder, base = folder_and_base(name)
        if not base:
            return None
        return self._mention_images.find(name, [folder + base.split(".")[0] + ".jpg", folder + base])

    @cached_property
    def _mention_images(self) -> ImageFiles:
        return ImageFiles(self._image_folders)


def _image_folders(folder: Path) -> list[Path]:
    """The folder of mention images, then the zips: what was unpacked goes before what was not."""
    found = [folder / name for name in _MENTION_IMAGES if (folder / name).is_dir()]
    if len(found) > 1:
        names = " and ".join(f"{path.name}/" for path in found)
        raise UserError(f"{folder}: has both {names}; keep the one that holds the mentions' pictures")
    return [*found, *(folder / f"{name}.zip" for name in _MENTION_IMAGES)]


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


LAYOUT = Layout(
    MimicRelease.layout,
    MimicRelease,
    MimicRelease.fits,
    {KB_FILE: KnowledgeBaseReader(MimicKb, has_descriptions=True)},
    precedence=10,
)
