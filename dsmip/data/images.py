"""Encoded pictures to uint8 tensors of the backbone's size."""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dsmip.config import Frozen

MAX_PIXELS = 64_000_000
_START, _END = b"\xff\xd8", b"\xff\xd9"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xDA))


class UnreadableImage(ValueError):
    """Bytes that are no picture, a broken one, or one too large to decode."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What a plain JPEG says before its pixels.

    Attributes:
        channels: 1 (grey) or 3.
        metadata: It has EXIF or XMP.
    """

    width: int
    height: int
    channels: int
    metadata: bool


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a plain JPEG: 8 bits, grey or three colours, Huffman-coded, up to its end-of-image marker.

    None is every other file, JPEGs of other kinds and truncated ones too: these are left to Pillow.
    """
    # Strict where decoders are lenient (bytes between segments), so that a decoder reads the same frame size.
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    offset, metadata = len(_START), False
    frame: tuple[int, int, int, int] | None = None
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker, length = data[offset + 1], struct.unpack_from(">H", data, offset + 2)[0]
        if marker == _START_OF_SCAN:
            return None if frame is None else JpegHeader(frame[2], frame[1], frame[3], metadata)
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            return None
        if marker in _HUFFMAN_FRAMES and offset + 10 <= len(data):
            frame = struct.unpack_from(">BHHB", data, offset + 4)
            bits, height, width, channels = frame
            if bits != 8 or channels not in (1, 3) or not width * height:
                return None
        metadata |= marker == _APP1
        offset += 2 + length
    return None


def decode_jpeg(data: bytes) -> Tensor:
    """uint8 [3, H, W] RGB (a view of rows of pixels) of a JPEG that has a `jpeg_header`, twice as fast as Pillow.

    The caller bounds the size first. Damaged pixels are no error, as in Pillow: libjpeg replaces them.

    Raises:
        RuntimeError: the data ends early, or is not decodable at all.
    """
    # A third of what a process imports, which one that reads finished features never needs.
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode_with_torchvision

    # A copy, because PyTorch warns of memory that cannot be written to.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = decode_with_torchvision(encoded, mode=ImageReadMode.RGB)
    return image


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W] RGB of an encoded picture; what is transparent becomes white.

    Raises:
        UnreadableImage: not a picture, truncated, or more than MAX_PIXELS.
    """
    try:
        # The header is read first: a small file that claims a huge picture is refused before it is decoded.
        if (header := jpeg_header(data)) is not None:
            _check_size(header.width, header.height)
            return decode_jpeg(data)
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size)
            pixels_HWC = np.array(_opaque(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address; the same file must give the same message everywhere.
        raise UnreadableImage("not a picture of a known format") from None
    except Exception as error:
        # Readers raise many kinds of errors on broken files; all of them mean the same here.
        raise UnreadableImage(f"not a readable picture: {error}") from error
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels are above the limit of {MAX_PIXELS}")


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


class PixelForm(Frozen):
    """How a picture becomes a square; the defaults are CLIP's.

    Attributes:
        resize: crop: the shorter side is resized, then the centre is taken; squash: both sides are resized.
        filter: Of the resizing, antialiased.
        part: Share of the resized side that is kept, the middle (timm's crop_pct).
    """

    added: ClassVar[Mapping[str, Any]] = {"part": 1.0}

    resize: Literal["crop", "squash"] = "crop"
    filter: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    part: float = Field(1.0, gt=0, le=1)


CLIP_PIXELS = PixelForm()


def fit(image: Tensor, size: int, form: PixelForm = CLIP_PIXELS) -> Tensor:
    """uint8 [3, size, size].

    Args:
        image: uint8 [3, H, W].
        form: How it becomes a square.
    """
    if form.part < 1:
        whole = fit(image, int(size / form.part), form.model_copy(update={"part": 1.0}))
        return _centre(whole, size, size).contiguous()
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    if form.resize == "squash":
        return _resized(image, (size, size), form.filter)
    # Only the centre square is kept: a margin around it bounds the memory for extreme aspect ratios.
    short = min(height, width)
    image = _centre(image, min(height, 3 * short), min(width, 3 * short))
    height, width = image.shape[1:]
    target = (max(size, size * height // short), max(size, size * width // short))
    return _centre(_resized(image, target, form.filter), size, size).contiguous()


def _resized(image: Tensor, target: tuple[int, int], name: str) -> Tensor:
    """uint8 [3, *target]."""
    if name != "lanczos":
        return functional.interpolate(image[None], size=target, mode=name, antialias=True)[0]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = picture.resize((target[1], target[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top = round((image.shape[1] - height) / 2)
    left = round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]
