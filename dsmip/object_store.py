"""Object stores: what is a URI, the file system behind it, and its errors in one line.

Credentials and endpoints are the provider's usual ones (AWS_*, GOOGLE_APPLICATION_CREDENTIALS ...): nothing of them is
read or stored here.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import fsspec
import platformdirs

from dsmip.errors import ReportedError, StoreAway, UserError

Result = TypeVar("Result")

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.+)", re.S)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_WAITS = (1.0, 3.0)  # seconds before another try; the providers' clients have tried for some seconds themselves
_PATIENCE = 30.0  # seconds after which nothing is tried again
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI (`s3://bucket/folder`). A Path never is: it has lost a slash."""
    return isinstance(location, str) and _URI.fullmatch(location) is not None


def join(uri: str, name: str) -> str:
    """The URI of a file below a URI."""
    return f"{uri.rstrip('/')}/{name}"


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, without cached listings, and the path there. Opens no connection.

    Raises:
        UserError: the scheme is unknown, the package for it is not installed, or the URI cannot be used.
    """
    scheme, authority, path = split_uri(uri)
    if scheme not in fsspec.available_protocols() or scheme == "memory":  # memory: of one process alone
        raise UserError(f"{uri}: no storage is known by '{scheme}://'; give a folder, s3://..., gs://... or file://...")
    try:
        system = _system(f"{scheme}://{authority}", os.getpid())
        return system, str(system._strip_protocol(f"{scheme}://{authority}/{path}")).rstrip("/")
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        what = f"pip install 'dsmip[{extra}]'" if extra else str(error)
        raise UserError(f"{uri}: '{scheme}://' needs a package that is not installed: {what}") from error
    except Exception as error:  # each file system refuses in its own way what it cannot open
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{uri}: cannot be opened as a place in a store ({reason})") from error


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme, authority (the bucket) and path. Raises UserError for an address that would be written but not found."""
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
def _system(root: str, process: int) -> fsspec.AbstractFileSystem:
    """One for all threads of a process, as each has connections of its own; fsspec itself makes one for each thread."""
    # No listings are kept: others write there too.
    return fsspec.url_to_fs(root, use_listings_cache=False, skip_instance_cache=True)[0]


def attempt(uri: str, call: Callable[[], Result]) -> Result:
    """Calls; lost connections and the like are tried again a few times. `uri`: what the call is about, for messages.

    Raises:
        UserError: no credentials, no permission, or the disk here is full.
        StoreAway: the store cannot be reached.
        FileNotFoundError: there is no such object or bucket; the caller knows what that means.
    """
    started = time.monotonic()
    for wait in (*_WAITS, None):
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
    return Path(os.environ.get("DSMIP_CACHE") or platformdirs.user_cache_dir("dsmip")).absolute()


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
