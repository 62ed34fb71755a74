"""The picture files of a release, in folders or still in zips: found by the name in a record, read one by one."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from data_prep.release import Finding, RawPicture
from data_prep.zip_members import read_member, zip_members


class PictureFiles:
    """All files of some folders and zips, by base name; the first place that has a name wins.

    refused: a finding for each member of a zip that is not read. A parser delivers them once.

    Raises:
        UserError: a zip is damaged.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = tuple(place for place in places if place.exists())
        self._found: dict[str, RawPicture] = {}
        refused: list[Finding] = []
        for place in self.places:
            if place.is_dir():
                pictures = _folder(place)
            else:
                members, faults = zip_members(place)
                pictures = [replace(member, name=base_name(member.name)) for member in members]
                refused += faults
            for picture in pictures:
                # Archives from some systems hold decomposed names.
                for name in (picture.name, unicodedata.normalize("NFC", picture.name)):
                    self._found.setdefault(name, picture)
        self.refused = tuple(refused)

    def find(self, name: str, candidates: Iterable[str]) -> RawPicture:
        """The first candidate, as it is or percent-decoded, that is a file here; folders in a name do not count.

        name: what the record calls the picture; it stays the name of what is found, or of what is lost.
        """
        candidates = list(candidates)
        for candidate in [*candidates, *map(unquote, candidates)]:
            base = base_name(candidate)
            found = self._found.get(base) or self._found.get(unicodedata.normalize("NFC", base))
            if found:
                return RawPicture(name, found.path, found.member, found.size)
        return RawPicture(name, None)

    def files(self) -> list[Path]:
        """The files that the pictures are in: a zip, or every file of a folder; in a fixed order."""
        zips = {place for place in self.places if not place.is_dir()}
        return sorted(zips | {picture.path for picture in self._found.values() if picture.path})


def base_name(name: str) -> str:
    """What follows the last slash of either kind."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def read_picture(picture: RawPicture, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of a picture that was found.

    Raises:
        OSError: it cannot be read.
    """
    if picture.path is None:
        raise FileNotFoundError(picture.name)
    if picture.member is None:
        with picture.path.open("rb") as stream:
            return stream.read(max_bytes + 1)
    return read_member(picture.path, picture.member, max_bytes)


def _folder(folder: Path) -> list[RawPicture]:
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]
    return [RawPicture(name, folder / name, None, size) for name, size in sorted(found)]
