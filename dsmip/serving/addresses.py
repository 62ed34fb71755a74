"""Pictures by address: fetched from below the addresses that the service's owner allows, and from nowhere else."""

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from dsmip.errors import UserError

SECONDS = 5.0  # for one picture, from the connection to the last byte
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}


class NotFetched(ValueError):
    """A picture cannot be had from an address; the message is for the client, and names nothing of the server's."""


def checked_prefix(text: str) -> str:
    """An address that pictures may be fetched from below, as it was given.

    Raises:
        UserError: It is none, or its path does not end where a folder does.
    """
    if _parts(text) is None or not urlsplit(text).path.endswith("/"):
        raise UserError(
            f"--image-urls {text}: give the start of addresses up to a slash, as https://example.org/images/"
        )
    return text


def is_allowed(address: str, prefixes: Sequence[str]) -> bool:
    """Whether an address has scheme, host, port and the start of the path of one of the prefixes.

    >>> is_allowed("https://example.org/images/a.jpg", ["https://example.org/images/"])
    True
    >>> is_allowed("https://example.org/images/../a.jpg", ["https://example.org/images/"])
    False
    >>> is_allowed("https://example.org@evil.org/images/a.jpg", ["https://example.org/images/"])
    False
    """
    asked = _parts(address)
    if asked is None:
        return False
    allowed = filter(None, map(_parts, prefixes))
    return any(asked[:3] == each[:3] and asked[3].startswith(each[3]) for each in allowed)


def fetch(address: str, prefixes: Sequence[str], max_bytes: int) -> bytes:
    """The bytes at an address. Redirects are not followed, and no proxy, password or cookie is used.

    Args:
        address: Of the picture.
        prefixes: Of what is allowed.
        max_bytes: More are not read.

    Raises:
        NotFetched: It is not allowed, or cannot be had.
    """
    if not is_allowed(address, prefixes):
        raise NotFetched("this address is not allowed; send the picture itself, as base64")
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    deadline, content = time.monotonic() + SECONDS, bytearray()
    try:
        with opener.open(urllib.request.Request(address, headers={"User-Agent": "dsmip"}), timeout=SECONDS) as stream:
            while chunk := stream.read1(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise NotFetched(f"a picture may have {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise NotFetched(f"the address did not answer in {SECONDS:.0f} seconds")
    except urllib.error.HTTPError as error:
        raise NotFetched(f"the address answers with status {error.code}") from None
    except TimeoutError:
        raise NotFetched(f"the address did not answer in {SECONDS:.0f} seconds") from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, NotFetched):
            raise
        raise NotFetched("the address cannot be reached") from None
    return bytes(content)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where an address leads to has not been allowed."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Any:
        return None


def _parts(address: str) -> tuple[str, str, int, str] | None:
    """Scheme, host, port and path; None for what is no plain address of the web."""
    try:
        split = urlsplit(address)
        port = split.port
    except ValueError:
        return None
    if split.scheme not in _PORTS or not split.hostname or "@" in split.netloc or not address.isascii():
        return None
    if any(each in (".", "..") for each in unquote(split.path).replace("\\", "/").split("/")):
        return None
    return split.scheme, split.hostname, port or _PORTS[split.scheme], split.path
