"""Limits of what a served linker takes; everything above them is refused with a status that says so."""

from pydantic import Field

from dsmip.config import Frozen


class Limits(Frozen):
    """Bounds of a request, and of the work that waits.

    Attributes:
        body_bytes: Of a request's body (413).
        image_bytes: Of one encoded picture (413).
        text_length: Characters of a word, a sentence or a description (422).
        mentions: In one request (413).
        top: Entities that a mention may get (422).
        waiting: Mentions that wait at a time; above it requests are refused for the moment (429).
        batch: Mentions that are linked at a time.
        retry_after: Seconds that a refused client is told to wait.
        image_urls: Starts of addresses below which pictures may be fetched; none: no address is (422).
        fetch_seconds: Of all addresses of a request; those that are left then are not fetched (422).
    """

    body_bytes: int = Field(32 << 20, ge=1)
    image_bytes: int = Field(10 << 20, ge=1)
    text_length: int = Field(20_000, ge=1)
    mentions: int = Field(256, ge=1)
    top: int = Field(100, ge=1)
    waiting: int = Field(1024, ge=1)
    batch: int = Field(32, ge=1)
    retry_after: int = Field(1, ge=1)
    image_urls: tuple[str, ...] = ()
    fetch_seconds: float = Field(20.0, gt=0)


DEFAULT_LIMITS = Limits()
