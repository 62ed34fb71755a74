"""The knowledge base of the MIMIC layout: kb_entity.json, its pictures, and qid2id.json where a release has it.

Rows of a dataset are the order of the list. `id` and qid2id.json say the same in a sound release and are only compared.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.fields import ChosenField, percent_decoded, text_of, type_problem
from data_prep.json_records import array_records, object_records
from data_prep.picture_files import PictureFiles
from data_prep.release import Finding, RawEntity, ReleaseOptions
from dsmip.errors import UserError

KB_FILE = "kb_entity.json"
_ROWS_FILE = "qid2id.json"


class MimicKb:
    """Entities of `file`, which lies beside its pictures (folder kb_image or kb_image.zip)."""

    def __init__(self, file: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        self._file, self._text = file, options.entity_text
        self._rows_file = file.with_name(_ROWS_FILE)

    def files(self) -> list[tuple[str, Path]]:
        """The JSON files and what the pictures are in, by their names below the folder."""
        paths = [self._file, *[self._rows_file] * self._rows_file.is_file(), *self._pictures.files()]
        return [(path.relative_to(self._file.parent).as_posix(), path) for path in paths]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities in the order of the list, and findings, also those of the pictures' zip.

        Raises:
            UserError: wrong JSON; no record has the text that was chosen; qid2id.json agrees with no record.
        """
        yield from self._pictures.refused
        rows = _Rows(self._rows_file, self._file)
        text = ChosenField(self._file, self._text) if self._text == "desc" else None
        types = {"qid": str, "entity_name": str, self._text: str, "image_list": list}
        for position, record in enumerate(array_records(self._file)):
            if problem := type_problem(record, types):
                yield Finding(self._file.name, position, "wrong type", "rejected", problem)
                continue
            if text:
                yield from text.findings(position, record)
            qid, name, attributes = (text_of(record, field) for field in ("qid", "entity_name", self._text))
            yield from rows.findings(position, qid, record.get("id"))
            pictures = tuple(self._pictures.find(file, [file]) for file in record.get("image_list") or [] if file)
            yield RawEntity(self._file.name, position, qid, percent_decoded(name).strip(), attributes, pictures)
        if text:
            text.finish()
        yield from rows.finish()

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Qids and records as they are, of all records that have a qid."""
        for record in array_records(self._file):
            if isinstance(record, dict) and isinstance(record.get("qid"), str):
                yield record["qid"].strip(), record

    @cached_property
    def _pictures(self) -> PictureFiles:
        return PictureFiles([self._file.parent / "kb_image", self._file.parent / "kb_image.zip"])


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
            yield Finding(self._kb.name, position, "non-contiguous id", "repaired", f"{qid}: {record_id}")
        if not self._row_of or not qid:
            return
        self._left.pop(qid, None)
        self._compared += 1
        row = self._row_of.get(qid)
        if row is not None and row == (position if record_id is None else record_id):
            self._agreed += 1
        else:
            said = "is not in it" if row is None else f"is {row} there"
            yield Finding(self._kb.name, position, f"{_ROWS_FILE} disagrees", "repaired", f"{qid} {said}")

    def finish(self) -> Iterator[Finding]:
        """What the file has and the list has not. Raises UserError where it is another release's."""
        if self._compared and not self._agreed:
            raise UserError(
                f"{self._path}: agrees with no record of {self._kb.name}; bring the one of this release or remove it "
                "(the order of the list says the same)"
            )
        for position, qid in enumerate(self._row_of):
            if qid in self._left:
                yield Finding(self._path.name, position, f"not in {self._kb.name}", "repaired", qid)
