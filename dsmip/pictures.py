"""Encoded pictures to uint8 tensors of the backbone's size."""

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

MAX_PIXELS = 64_000_000


class UnreadablePicture(ValueError):
    """Bytes that are no picture, a broken one, or one too large to decode."""


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W] RGB of an encoded picture; what is transparent becomes white.

    Raises:
        UnreadablePicture: not a picture, truncated, or more than MAX_PIXELS.
    """
    try:
        # The header is read first: a small file that claims a huge picture is refused before it is decoded.
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadablePicture(f"{width} x {height} pixels are above the limit of {MAX_PIXELS}")
            pixels_HWC = np.array(_opaque(image))
    except UnreadablePicture:
        raise
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address; rejects.jsonl must be the same in every build.
        raise UnreadablePicture("not a picture of a known format") from None
    except Exception as error:
        # Pillow's readers raise many kinds of errors on broken files; all of them mean the same here.
        raise UnreadablePicture(f"not a readable picture: {error}") from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def fit(picture: Tensor, size: int) -> Tensor:
    """uint8 [3, size, size]: shorter side resized (antialiased bicubic), then the centre, as CLIP prepares pictures.

    Args:
        picture: uint8 [3, H, W].
    """
    height, width = picture.shape[1:]
    if (height, width) == (size, size):
        return picture
    # Only the centre square is kept: a margin around it bounds the memory for extreme aspect ratios.
    short = min(height, width)
    picture = _centre(picture, min(height, 3 * short), min(width, 3 * short))
    height, width = picture.shape[1:]
    target = (max(size, size * height // short), max(size, size * width // short))
    resized = functional.interpolate(picture[None], size=target, mode="bicubic", antialias=True)[0]
    return _centre(resized, size, size).contiguous()


def _centre(picture: Tensor, height: int, width: int) -> Tensor:
    top = round((picture.shape[1] - height) / 2)
    left = round((picture.shape[2] - width) / 2)
    return picture[:, top : top + height, left : left + width]
