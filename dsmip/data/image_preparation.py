"""Preparation of an image: a JPEG that is bounded, upright, RGB and never enlarged; or the reason why not.

torchvision decodes and encodes, torch resizes: twice as fast as Pillow here, which does what only it can do (other
formats and colour spaces, EXIF rotation, decoding at a fraction of the size). torch resizes with all threads it is
allowed: a pool of processes sets `torch.set_num_threads(1)` in each.
"""

import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.nn import functional
from torchvision.io import encode_jpeg

from dsmip.data import images
from dsmip.data.images import decode_jpeg, jpeg_header
from dsmip.data.manifest import MAX_FILE_BYTES, ImageSettings

JPEG_QUALITY = 92
IMAGES = ImageSettings(size=224, quality=JPEG_QUALITY)
MAX_PIXELS = images.MAX_PIXELS  # what is prepared must be readable in training
# Of JPEGs that are decoded at a fraction of their size, line by line. Pillow itself refuses from 179 million on.
MAX_REDUCED_PIXELS = 170_000_000
# A model sees the centre square, so what lies beyond this ratio of the sides is never looked at.
MAX_ASPECT = 4
_MAX_JPEG_SIDE = 65500
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
_ORIENTATION = 0x0112


class UnusableImage(Exception):
    """`args[0]` is the reason: "picture unreadable" or "picture too large"."""


def prepare_image(content: bytes, settings: ImageSettings) -> bytes:
    """JPEG bytes whose shorter side is at most `settings.size` pixels; a small upright RGB JPEG is kept as it is.

    With `keep_original` nothing is resized, and every upright RGB or grey JPEG is kept as it is. What is kept decodes.
    What is transparent becomes white, the first frame of a moving image counts. Damaged pixels inside a whole JPEG
    are no fault: decoders replace them, and most such images still show what they show.

    Args:
        content: The bytes of the release's file.
        settings: How images are stored.

    Raises:
        UnusableImage: The bytes are no image, it is cut short, or it has more than MAX_PIXELS pixels (a JPEG that is
            shrunk and not progressive: MAX_REDUCED_PIXELS).
    """
    if len(content) > MAX_FILE_BYTES:
        raise UnusableImage("picture too large")
    try:
        return _prepare(content, settings)
    except (UnusableImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("picture too large") from error
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise MemoryError(str(error)) from error  # torch has no error of its own for it
        raise UnusableImage("picture unreadable") from error


def _prepare(content: bytes, settings: ImageSettings) -> bytes:
    header = jpeg_header(content)
    if header is None or (header.metadata and _is_turned(content)):
        return _prepare_with_pillow(content, settings)
    width, height = header.width, header.height
    if width * height > MAX_PIXELS:
        return _prepare_with_pillow(content, settings)
    kept = _is_kept(len(content), width, height, header.channels, settings)
    if not kept and min(width, height) >= 4 * settings.size and not settings.keep_original:
        return _prepare_with_pillow(content, settings)  # which decodes it at a fraction of its size
    image = decode_jpeg(content)
    return content if kept else _encoded(image, settings)


def _prepare_with_pillow(content: bytes, settings: ImageSettings) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is checked here; doubtful metadata does not matter
        with Image.open(BytesIO(content), formats=_FORMATS) as image:
            is_jpeg, turned = image.format in ("JPEG", "MPO"), _orientation(image) != 1
            # A progressive one is held whole, however small it comes out.
            is_reduced = is_jpeg and not settings.keep_original and not image.info.get("progressive")
            _check_size(*image.size, MAX_REDUCED_PIXELS if is_reduced else MAX_PIXELS)
            channels = {"RGB": 3, "L": 1}.get(image.mode, 0)
            if is_jpeg and not turned and _is_kept(len(content), *image.size, channels, settings):
                _check_size(*image.size, MAX_PIXELS)
                image.load()
                return content
            if is_jpeg and not settings.keep_original:
                # Decodes at 1/2, 1/4 or 1/8 where that still leaves twice the wanted size.
                scale = 2 * settings.size / min(image.size)
                image.draft("RGB", (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
                _check_size(*image.size, MAX_PIXELS)
            upright = ImageOps.exif_transpose(image) if turned else image
            pixels_HWC = np.array(_on_white(upright))
    return _encoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), settings)


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise UnusableImage("picture too large")


def _is_kept(num_bytes: int, width: int, height: int, channels: int, settings: ImageSettings) -> bool:
    """Whether an upright JPEG stays as it is."""
    if settings.keep_original:
        return channels in (1, 3)
    short, long = sorted((width, height))
    sparse = num_bytes <= 8 * width * height + 65536  # else most of it is something else than the picture
    return channels == 3 and short <= settings.size and long <= MAX_ASPECT * short and sparse


def _is_turned(content: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(content), formats=_FORMATS) as image:
            return _orientation(image) != 1


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where there is none or it is not one of 2 .. 8."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata costs no picture
        return 1
    return value if value in range(2, 9) else 1


def _on_white(image: Image.Image) -> Image.Image:
    # Older Pillows have 16-bit PNGs in mode I. Of both modes PIL makes white by clipping.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def _encoded(image: Tensor, settings: ImageSettings) -> bytes:
    """JPEG bytes of a uint8 [3, H, W], resized unless the original size is wanted."""
    if not settings.keep_original:
        image = _shrunk(image, settings.size)
    if max(image.shape) > _MAX_JPEG_SIDE:
        raise UnusableImage("picture too large")
    encoded: Tensor = encode_jpeg(image, settings.quality)
    return encoded.numpy().tobytes()


def _shrunk(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[1:]
    limit = MAX_ASPECT * min(width, height)
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    image = image[:, top : top + limit, left : left + limit]
    height, width = image.shape[1:]
    short = min(width, height)
    if short <= size:
        return image
    new_size = (max(1, round(height * size / short)), max(1, round(width * size / short)))
    return functional.interpolate(image[None], size=new_size, mode="bicubic", antialias=True)[0]
