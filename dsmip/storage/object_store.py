"""The client of object stores: what is listed, read, sent and removed there, in which version, and what fails in words.

Nothing else here calls fsspec. Credentials and endpoints are the provider's usual ones (AWS_*,
GOOGLE_APPLICATION_CREDENTIALS ...): nothing of them is read or stored here.
"""

import errno
import glob
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from pyarrow.fs import FSSpecHandler, PyFileSystem

from dsmip.errors import ReportedError, StoreAway, UserError, refuse_secret
from dsmip.private import own_folder, private_folder, user_cache_folder

Result = TypeVar("Result")

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.+)", re.S)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
RETRY_WAITS = (1.0, 3.0)  # seconds before another try; the providers' clients have tried for some seconds themselves
_PATIENCE = 30.0  # seconds after which nothing is tried again
_TAGS = ("ETag", "etag", "generation", "md5Hash")
_DATES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_OTHER_CACHE = "set DSMIP_CACHE to a folder of your own"
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store says of an object.

    Attributes:
        size: Bytes.
        version: Differs when the content does; a listing and a question for the object alone give the same.
    """

    size: int
    version: str


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """The objects below a URI, by their names from there (with slashes; "" is all of them).

    Connections are opened when they are needed, in each process; so it pickles. Lost ones are tried again (`attempt`).

    Raises:
        UserError: By every method, in one line with the object's address: the store refuses.
        StoreAway: By every method, likewise: the store cannot be reached.
    """

    uri: str

    def address(self, name: str) -> str:
        """The URI of an object."""
        root = self.uri.rstrip("/")
        return f"{root}/{name}" if name else root

    def objects(self, name: str = "") -> dict[str, StoredObject]:
        """An object, or all below a folder, by name; none when there is nothing.

        Raises:
            FileNotFoundError: There is no such bucket.
        """
        system, root = self._system()
        found = self._call(name, lambda: system.find(self._path(name), detail=True))
        start = len(root) + 1
        return {path[start:]: stored_object(info) for path, info in found.items() if info.get("type") == "file"}

    def children(self, name: str) -> list[str]:
        """Names of the objects and folders directly in a folder, without the folder's; none when it is missing."""
        system, path = self._system()[0], self._path(name)
        try:
            found: list[str] = self._call(name, lambda: system.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(each.rstrip("/")) for each in found if each.rstrip("/") != path)

    def glob(self, pattern: str) -> list[str]:
        """Names of objects and folders that match, in order."""
        system, root = self._system()
        found = self._call("", lambda: system.glob(f"{glob.escape(root)}/{pattern}"))
        return sorted(str(each)[len(root) + 1 :] for each in found)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None when there is none."""
        system = self._system()[0]
        try:
            content: bytes = self._call(name, lambda: system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        system = self._system()[0]
        self._write(name, lambda: system.pipe_file(self._path(name), content))

    def open(self, name: str) -> BinaryIO:
        """An object, to be read from any place; what is read is fetched then.

        Raises:
            FileNotFoundError: There is no such object.
        """
        system = self._system()[0]
        # whose own lines have no bound
        return io.BufferedReader(self._call(name, lambda: system.open(self._path(name), "rb")))

    def get(self, name: str, target: Path) -> None:
        """Copies an object into a file here.

        Raises:
            FileNotFoundError: There is no such object.
        """
        system = self._system()[0]
        self._call(name, lambda: system.get_file(self._path(name), str(target)))

    def put(self, source: Path, name: str) -> str:
        """Copies a file from here; returns the version that the store has now."""
        system = self._system()[0]
        self._write(name, lambda: system.put_file(str(source), self._path(name)))
        return stored_object(self._write(name, lambda: system.info(self._path(name)))).version

    def remove(self, name: str) -> None:
        """Removes an object, if it is there."""
        system = self._system()[0]
        with suppress(FileNotFoundError):
            self._call(name, lambda: system.rm_file(self._path(name)))

    def remove_folder(self, name: str) -> None:
        """Removes an object, or all below a folder, if there."""
        system = self._system()[0]
        with suppress(FileNotFoundError):
            self._call(name, lambda: system.rm(glob.escape(self._path(name)), recursive=True))

    def arrow_filesystem(self) -> tuple[str, PyFileSystem]:
        """The path of the URI, and the pyarrow file system that it is a path of."""
        system, root = self._system()
        return root, PyFileSystem(_LiteralNames(system))

    def _system(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem(self.uri)

    def _path(self, name: str) -> str:
        """An object's path on the store's file system."""
        return f"{self._system()[1]}/{name}".rstrip("/")

    def _call(self, name: str, call: Callable[[], Result]) -> Result:
        return attempt(self.address(name), call)

    def _write(self, name: str, call: Callable[[], Result]) -> Result:
        try:
            return self._call(name, call)
        except FileNotFoundError as error:
            raise UserError(f"{self.address(name)}: cannot be written ({error}); does the bucket exist?") from error


class _LiteralNames(FSSpecHandler):  # type: ignore[misc]
    """Deletes what is called `run*`, not all that begins with `run`."""

    def delete_dir(self, path: str) -> None:
        self.fs.rm(glob.escape(path), recursive=True)

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)


def stored_object(info: Mapping[str, Any]) -> StoredObject:
    """What fsspec says of an object, in a listing or for it alone.

    The version is size and entity tag. Dates count only where a store has no tags: a listing may have them with
    milliseconds, an object's own answer without, so they count to the second.
    """
    tags = [f"{key} {info[key]}" for key in _TAGS if info.get(key)]
    dates = [_to_the_second(info[key]) for key in _DATES if info.get(key)]
    return StoredObject(int(info["size"] or 0), " ".join([str(info["size"]), *(tags or dates)[:1]]))


def _to_the_second(date: object) -> str:
    if isinstance(date, int | float):
        return str(int(date))
    return str(date).partition(".")[0].removesuffix("Z").removesuffix("+00:00")


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI (`s3://bucket/folder`). A Path never is: it has lost a slash."""
    return isinstance(location, str) and _URI.fullmatch(location) is not None


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, without cached listings, and the path there. Opens no connection.

    Raises:
        UserError: The scheme is unknown, the package for it is not installed, or the URI cannot be used.
    """
    scheme, authority, path = split_uri(uri)
    if scheme not in fsspec.available_protocols() or scheme == "memory":  # memory: of one process alone
        raise UserError(f"{uri}: no storage is known by '{scheme}://'; give a folder, s3://..., gs://... or file://...")
    try:
        system = connected_system(f"{scheme}://{authority}", os.getpid())
        return system, str(system._strip_protocol(f"{scheme}://{authority}/{path}")).rstrip("/")
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        what = f"pip install 'dsmip[{extra}]'" if extra else str(error)
        raise UserError(f"{uri}: '{scheme}://' needs a package that is not installed: {what}") from error
    except Exception as error:  # each file system refuses in its own way what it cannot open
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{uri}: cannot be opened as a place in a store ({reason})") from error


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme, authority (the bucket) and path of a URI.

    Raises:
        UserError: It is no URI, holds a secret, or would be written but not found again.
    """
    refuse_secret(uri, "address")
    match = _URI.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri}: not a URI, as s3://bucket/folder is")
    scheme = match[1].lower()
    authority, _, path = match[2].partition("/")
    if scheme != "file":
        if "?" in match[2]:
            raise UserError(f"{uri}: a '?' and what follows it cannot be part of the address; leave it out")
        if "//" in f"/{path}".rstrip("/") or (scheme in _EXTRAS and not authority):
            raise UserError(f"{uri}: has an empty name between two slashes; write one slash")
    return scheme, authority, path


@lru_cache(16)
def connected_system(root: str, process: int) -> fsspec.AbstractFileSystem:
    """The file system at `scheme://bucket`, one for all threads of a process; fsspec itself makes one for each thread.

    Args:
        root: Scheme and bucket.
        process: The process's number: each process opens connections of its own.
    """
    # No listings are kept: others write there too.
    return fsspec.url_to_fs(root, use_listings_cache=False, skip_instance_cache=True)[0]


def attempt(uri: str, call: Callable[[], Result]) -> Result:
    """Calls; lost connections and the like are tried again a few times.

    Args:
        uri: What the call is about, for messages.
        call: Makes one request.

    Returns:
        What `call` returns.

    Raises:
        UserError: No credentials, no permission, or the disk here is full.
        StoreAway: The store cannot be reached.
        FileNotFoundError: There is no such object or bucket; the caller knows what that means.
    """
    started = time.monotonic()
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except (FileNotFoundError, ReportedError):
            raise
        except Exception as error:  # each provider's client has errors of its own
            if not _may_pass(error):
                raise UserError(_in_words(uri, error)) from error
            if wait is None or time.monotonic() - started > _PATIENCE:
                raise StoreAway(_in_words(uri, error)) from error
            time.sleep(wait)
    raise AssertionError


def cache_folder() -> Path:
    """Where copies of remote files are kept on this node: DSMIP_CACHE, else in the user's cache folder."""
    return Path(os.environ.get("DSMIP_CACHE") or user_cache_folder()).absolute()


def private_cache(name: str) -> Path:
    """A folder of the cache, made when it is missing: only this user can look into it.

    Raises:
        UserError: It, or the cache, is a link, another user's, or may be written by others.
    """
    own_folder(cache_folder(), _OTHER_CACHE)
    return private_folder(cache_folder() / name, _OTHER_CACHE)


def _may_pass(error: Exception) -> bool:
    """Whether another try may help."""
    if isinstance(error, PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.filename is None and error.errno not in {*_LOCAL_FAULTS, errno.EINVAL}
    root = type(error).__module__.partition(".")[0]
    return isinstance(error, TimeoutError) or (root not in {"builtins", "dsmip"} and not _lacks_credentials(error))


def _lacks_credentials(error: Exception) -> bool:
    return "Credential" in type(error).__name__


def _in_words(uri: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and (error.filename or error.errno in _LOCAL_FAULTS):
        where = error.filename or cache_folder()
        return f"{where}: {error.strerror or reason}, while {uri} was copied here; make room, or set DSMIP_CACHE"
    if isinstance(error, PermissionError) or _lacks_credentials(error):
        return f"{uri}: access denied ({reason}); set the store's credentials, as for its own tools"
    return f"{uri}: the store failed or cannot be reached ({type(error).__name__}: {reason}); run the command again"
