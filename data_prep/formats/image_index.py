"""Index of image files: the one rule by which what a record calls an image is matched to a file.

A name fits a file as it is written, or else when one of the two paths ends with the other: "Q0/0.jpg" fits Q0/0.jpg,
more/Q0/0.jpg and 0.jpg, but never Q1/0.jpg. The longest common end decides. A folder named like the folder or zip that
it lies in does not count (kb_image/ in kb_image.zip). Percent escapes, the form of accents (NFC, NFD) and case make no
difference, unless they tell files apart. A name that fits several files fits none: nothing is guessed.
"""

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from data_prep.formats.release import RawImage

_KNOWN_NAMES = 1 << 12


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of a container (a folder or a zip).

    Attributes:
        path: Its path there.
        container: The folder or zip.
        member: Its name in the zip; None: `container` is a folder.
        size: Bytes.
    """

    path: str
    container: Path
    member: str | None
    size: int

    @property
    def on_disk(self) -> Path:
        return self.container / self.path if self.member is None else self.container


@dataclass(frozen=True, slots=True)
class _Match:
    """What a name fits.

    Attributes:
        form: Which of `_FORMS` makes them equal: the lower, the stricter.
        files: Positions of the files.
        beyond: The folders of the name that the files' paths do not have.
    """

    form: int
    files: tuple[int, ...]
    beyond: str = ""


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _folded(path: str) -> str:
    return path.lower() if path.isascii() else _composed(_composed(path).casefold())


_FORMS: tuple[Callable[[str], str], ...] = (str, _composed, _folded)


class ImageIndex:
    """Files by every end of their paths, so that a name costs a few look-ups however many files there are.

    Args:
        containers: The files of each container. Of files of the same path the first container's counts.
    """

    def __init__(self, containers: Sequence[Sequence[ImageFile]]) -> None:
        self._files: list[ImageFile] = []
        self._by_end: dict[str, list[int]] = {}
        self._by_path: dict[str, list[int]] = {}  # without folders of the containers' names
        self._claimed: dict[int, str] = {}
        self._match = lru_cache(_KNOWN_NAMES)(self._matched)
        known: set[str] = set()
        own = {files[0].container.stem for files in containers if files}
        for files in containers:
            paths = [_without_own(file.path, own) for file in files]
            for file, path in zip(files, paths, strict=True):
                if _composed(path) not in known:
                    self._add(file, path)
            known.update(map(_composed, paths))

    def _add(self, file: ImageFile, path: str) -> None:
        position = len(self._files)
        self._files.append(file)
        for end in _ends(_folded(file.path)):
            self._by_end.setdefault(end, []).append(position)
        self._by_path.setdefault(_folded(path), []).append(position)

    def find(self, name: str, candidates: Iterable[str]) -> RawImage:
        """The file of the strictest match, of equal ones that of the first candidate; what it is called is `name`."""
        plain = [plain_path(candidate) for candidate in candidates]
        decoded = [plain_path(unquote(candidate)) for candidate in plain if "%" in candidate]
        matches = [match for match in map(self._match, [*plain, *decoded]) if match]
        if not matches:
            return RawImage(name, None)
        match = min(matches, key=lambda one: one.form)
        if len(match.files) > 1:
            return RawImage(name, None, fits=self._shown(match.files))
        found = self._files[match.files[0]]
        if match.beyond:
            # "a/1.jpg" and "b/1.jpg" cannot both be the only 1.jpg.
            claimed = self._claimed.setdefault(match.files[0], match.beyond)
            if not f"/{claimed}".endswith(f"/{match.beyond}") and not f"/{match.beyond}".endswith(f"/{claimed}"):
                return RawImage(name, None, fits=f"{self._shown(match.files)}, as {claimed}/... does")
        return RawImage(name, found.on_disk, found.member, found.size)

    def _matched(self, name: str) -> _Match | None:
        parts = name.split("/")
        for start, end in enumerate(_ends(_folded(name))):
            found = self._by_path.get(end, [])
            if start == 0:
                found = found or self._by_end.get(end, [])
                if len(found) == 1 and self._files[found[0]].path == name:
                    return _Match(0, (found[0],))
                found = [one for one in found if _folded(self._files[one].path) == end] or found
            wanted = "/".join(parts[start:])
            for number, form in enumerate(_FORMS):
                equal = tuple(one for one in found if form(self._tail(one, len(parts) - start)) == form(wanted))
                if equal:
                    return _Match(number, equal, "/".join(parts[:start]))
        return None

    def _tail(self, position: int, count: int) -> str:
        return "/".join(self._files[position].path.split("/")[-count:])

    def _shown(self, positions: Sequence[int]) -> str:
        files = [self._files[position] for position in positions[:2]]
        shown = " and ".join(f"{file.container.name}/{file.path}" for file in files)
        return shown + (f" and {len(positions) - 2} more" if len(positions) > 2 else "")


def _ends(path: str) -> Iterator[str]:
    """A path, then the same without its first folder, and so on to the base name."""
    start = 0
    while True:
        yield path[start:]
        if (start := path.find("/", start) + 1) == 0:
            return


def _without_own(path: str, own: Collection[str]) -> str:
    while (first := path.partition("/"))[0] in own and first[2]:
        path = first[2]
    return path


def plain_path(name: str) -> str:
    """A path without needless dots and slashes."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
