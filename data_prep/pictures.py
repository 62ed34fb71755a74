"""One raw picture to one prepared JPEG: bounded, upright, RGB, never enlarged; or the reason why not."""

import warnings
from io import BytesIO

from PIL import Image, ImageOps

JPEG_QUALITY = 92
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 1 << 28
# A model sees the centre square, so what lies beyond this ratio of the sides is never looked at.
MAX_ASPECT = 4
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ORIENTATION = 0x0112


class UnusablePicture(Exception):
    """`args[0]` is the reason: "picture unreadable" or "picture too large"."""


def prepare_picture(content: bytes, size: int) -> bytes:
    """JPEG bytes whose shorter side is at most `size` pixels; a small RGB JPEG is kept as it is.

    Transparent parts become white, the first frame of a moving picture counts.

    Raises:
        UnusablePicture: the bytes are no picture, it is cut short, or it has more than MAX_PIXELS pixels.
    """
    if len(content) > MAX_FILE_BYTES:
        raise UnusablePicture("picture too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked here; doubtful metadata does not matter
            return _prepare(content, size)
    except (UnusablePicture, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnusablePicture("picture too large") from error
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        raise UnusablePicture("picture unreadable") from error


def _prepare(content: bytes, size: int) -> bytes:
    with Image.open(BytesIO(content), formats=_FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise UnusablePicture("picture too large")
        plain = picture.format == "JPEG" and picture.mode == "RGB" and picture.getexif().get(_ORIENTATION, 1) == 1
        if plain and _fits(picture, size) and len(content) <= 8 * picture.width * picture.height + 65536:
            picture.load()
            return content
        if picture.format == "JPEG":
            # Decodes at 1/2, 1/4 or 1/8 where that still leaves twice the wanted size.
            scale = 2 * size / min(picture.size)
            picture.draft("RGB", (max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        upright = ImageOps.exif_transpose(picture)
        return _encode(_shrink(_on_white(upright), size))


def _fits(picture: Image.Image, size: int) -> bool:
    short, long = sorted(picture.size)
    return short <= size and long <= MAX_ASPECT * short


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # PIL clips 16-bit grey to white otherwise.
        return picture.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return picture.convert("RGB")


def _shrink(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) > limit:
        left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
        picture = picture.crop((left, top, left + min(width, limit), top + min(height, limit)))
        width, height = picture.size
    short = min(width, height)
    if short <= size:
        return picture
    new_size = (max(1, round(width * size / short)), max(1, round(height * size / short)))
    return picture.resize(new_size, Image.Resampling.BICUBIC)


def _encode(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
