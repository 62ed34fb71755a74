"""Pictures that records name by their paths in the release's folder, or in a zip there."""

import unicodedata
from pathlib import Path, PurePosixPath

from data_prep.release import RawPicture
from data_prep.zip_members import path_fault, zip_members

_FOLDER, _ZIP = "images/", "images.zip"


class PicturePaths:
    """What lies below `folder`, and in images.zip for what does not; members are named `images/x.jpg` or `x.jpg`.

    refused: a finding for each member of the zip that is not read. A parser delivers them once.

    Raises:
        UserError: the zip is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._root = folder, folder.resolve()
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
        path = self._folder / plain
        try:
            real = path.resolve()
            if not real.is_relative_to(self._root):
                return None
            if real.is_file():
                return RawPicture(name, path, None, real.stat().st_size)
        except (OSError, ValueError, RuntimeError):
            pass  # no name that a file can have, or links in a circle
        plain = unicodedata.normalize("NFC", plain)
        found = self._members.get(plain) or self._members.get(plain.removeprefix(_FOLDER))
        return RawPicture(name, found.path, found.member, found.size) if found else RawPicture(name, None)


def _plain(name: str) -> str:
    """Without needless dots and slashes."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()
