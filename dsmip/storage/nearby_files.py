"""Files of an object store by names relative to a folder of it, several fetched at a time."""

import posixpath
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dsmip.errors import ReportedError, StoreAway, UserError
from dsmip.storage.object_store import ObjectStore, split_uri

_AT_ONCE = 16


class NearbyFiles:
    """The contents of files that records of a folder in a store name.

    Names start from the folder; one that leads out of the bucket, or is the address of another one, is refused.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        """
        Args:
            folder: its URI.
            max_bytes: larger files are refused before they are fetched.
        """
        scheme, bucket, self._below = split_uri(folder.rstrip("/"))
        self._root = f"{scheme}://{bucket}"
        self._store, self._max_bytes = ObjectStore(self._root), max_bytes

    def fetched(self, names: Iterable[str]) -> Callable[[str], bytes]:
        """Fetches files side by side; returns what gives the content of each.

        That raises what fetching it did, a UserError (there is none, it is too large, or in another bucket) or a
        StoreAway.
        """
        wanted = list(dict.fromkeys(names))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip(wanted, pool.map(self._tried, wanted), strict=True))

        def content(name: str) -> bytes:
            each = found[name]
            if isinstance(each, ReportedError):
                raise each
            return each

        return content

    def _tried(self, name: str) -> bytes | ReportedError:
        try:
            return self._content(name)
        except (UserError, StoreAway) as error:
            return error

    def _content(self, name: str) -> bytes:
        path = self._path(name)
        found = self._store.objects(path).get(path)
        if found is None:
            raise UserError("no such file")
        if found.size > self._max_bytes:
            raise UserError(f"larger than {self._max_bytes} bytes")
        content = self._store.read(path)
        if content is None:
            raise UserError("no such file")
        return content

    def _path(self, name: str) -> str:
        """Below the bucket."""
        if "://" in name:
            if not name.startswith(f"{self._root}/"):
                raise UserError(f"is not in {self._root}, where the mentions are")
            return name.removeprefix(f"{self._root}/")
        path = posixpath.normpath(posixpath.join(self._below, name))
        if path.startswith(("/", "../")) or path == "..":
            raise UserError(f"is not in {self._root}, where the mentions are")
        return path
