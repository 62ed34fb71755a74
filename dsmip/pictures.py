"""Encoded pictures to uint8 tensors of the backbone's size, and whole batches."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from dsmip.batches import ItemBatch
from dsmip.text import Tokenizer

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


def collate(
    texts: Sequence[str], images: Sequence[bytes | None], tokenizer: Tokenizer, size: int, reserve: int = 0
) -> ItemBatch:
    """A batch of N items from their lines of text and encoded pictures (None: no picture).

    Args:
        size: side of the pictures (the backbone's image_size).
        reserve: token positions to leave free for prompts.

    Raises:
        UnreadablePicture: an encoded picture cannot be decoded (shards hold readable ones only).
        ValueError: texts and images differ in number.
    """
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} texts but {len(images)} images")
    pictures = torch.zeros(len(images), 3, size, size, dtype=torch.uint8)
    for row, image in enumerate(images):
        if image is not None:
            pictures[row] = fit(decode(image), size)
    has_image = torch.tensor([image is not None for image in images], dtype=torch.bool)
    return ItemBatch(tokenizer(texts, reserve), pictures, has_image)
