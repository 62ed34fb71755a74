"""Pictures of a request: base64, data: URLs, and addresses, fetched from below those that the owner allows alone."""

import base64
import binascii
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from dsmip.errors import UserError
from dsmip.serving.limits import Limits
from dsmip.serving.schemas import Unusable

SECONDS = 5.0  # for one picture, from the connection to the last byte
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}


class NotFetched(ValueError):
    """A picture cannot be had from an address; the message is for the client, and names nothing of the server's."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class Fetcher:
    """Pictures of one request, whose addresses may take `Limits.fetch_seconds` together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._left = limits.fetch_seconds

    def decoded(self, text: str, field: str) -> bytes:
        """The bytes of a base64 text, of a data: URL, or at an address that is allowed.

        Raises:
            Unusable: It is none of them, or too large.
        """
        if text.startswith("data:"):
            head, comma, text = text.partition(",")
            if not comma or not head.endswith(";base64"):
                raise Unusable(field, "a data: URL of a picture is data:image/...;base64,...")
        elif "://" in text[:16]:
            return self._fetched(text, field)
        if len(text) * 3 // 4 > self.limits.image_bytes + 3:
            raise too_large(field, self.limits)
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise Unusable(field, "is no base64") from None

    def _fetched(self, address: str, field: str) -> bytes:
        limits, started = self.limits, time.monotonic()
        if not limits.image_urls:
            raise Unusable(field, "no address is fetched; send the picture itself, as base64")
        if self._left <= 0:
            seconds = f"{limits.fetch_seconds:.0f} seconds"
            raise Unusable(field, f"the addresses of a request took {seconds} before; send fewer, or the pictures")
        try:
            return fetch(address, limits.image_urls, limits.image_bytes)
        except NotFetched as error:
            raise Unusable(field, str(error), status=error.status) from None
        finally:
            self._left -= time.monotonic() - started


def too_large(field: str, limits: Limits) -> Unusable:
    """Of a picture."""
    return Unusable(field, f"a picture may have {limits.image_bytes} bytes", status=413)


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
                    raise NotFetched(f"a picture may have {max_bytes} bytes", status=413)
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
