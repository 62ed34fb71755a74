"""Thumbnails inside a page, as data URIs."""

import base64
import io

from PIL import Image

_QUALITY = 75


def thumbnail(content: bytes, side: int) -> str:
    """A small JPEG as a data URI: the page stays small, and what the browser decodes was written here.

    Args:
        content: An encoded picture, JPEG as in a shard.
        side: Of the square that it is to fit.

    Returns:
        "" for what cannot be decoded.
    """
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.draft("RGB", (2 * side, 2 * side))
            small = image.convert("RGB")
            small.thumbnail((side, side))
            small.save(buffer, "JPEG", quality=_QUALITY)
    except Exception:  # decoders raise whatever broken bytes lead them to
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
