"""Pictures that records name by their paths in the release's folder, or in a zip there."""

import os
import stat
import unicodedata
from pathlib import Path
from typing import Literal

from data_prep.release import RawPicture
from data_prep.zip_members import path_fault, zip_members

_FOLDER, _ZIP = "images/", "images.zip"
_KNOWN_PARENTS = 1 << 12


class PicturePaths:
    """What lies below `folder`, and in images.zip for what does not; members are named `images/x.jpg` or `x.jpg`.

    refused: a finding for each member of the zip that is not read. A parser delivers them once.

    Raises:
        UserError: the zip is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._root = folder, folder.resolve()
        self._parents: dict[str, bool] = {}
        path = folder / _ZIP
        self.zips = (path,) if path.is_file() else ()
        members, refused = zip_members(path) if self.zips else ([], [])
        self._members = {unicodedata.normalize("NFC", _plain(member.name)): member for member in members}
        self.refused = tuple(refused)

    def find(self, name: str) -> RawPicture | None:
        """The picture at a path (or what is lost there); None for a path or a link that leads out of the folder."""
        if path_fault(name):
            return None
        plain = _plain(name)
        found = self._file(plain)
        if isinstance(found, int):
            return RawPicture(name, self._folder / plain, None, found)
        if found == "outside":
            return None
        plain = unicodedata.normalize("NFC", plain)
        member = self._members.get(plain) or self._members.get(plain.removeprefix(_FOLDER))
        return RawPicture(name, member.path, member.member, member.size) if member else RawPicture(name, None)

    def _file(self, plain: str) -> int | Literal["outside", "lost"]:
        """The size of the file at a path below the folder, or why it does not count."""
        try:
            if not self._is_inside(os.path.dirname(plain)):
                return "outside"
            path = os.path.join(self._folder, plain)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not Path(path).resolve().is_relative_to(self._root):
                    return "outside"
                status = os.stat(path)
        except (OSError, ValueError, RuntimeError):
            return "lost"  # no file, no name that a file can have, or links in a circle
        return status.st_size if stat.S_ISREG(status.st_mode) else "lost"

    def _is_inside(self, parent: str) -> bool:
        """Whether a folder, all links followed, is in the release's; most pictures share one."""
        if parent not in self._parents:
            if len(self._parents) == _KNOWN_PARENTS:
                self._parents.clear()
            self._parents[parent] = (self._folder / parent).resolve().is_relative_to(self._root)
        return self._parents[parent]


def _plain(name: str) -> str:
    """Without needless dots and slashes."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
