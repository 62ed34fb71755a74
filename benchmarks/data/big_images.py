"""Pictures of a big release: as many distinct JPEGs of a photograph's size as wanted, and every way to spoil one."""

import struct
from collections.abc import Callable, Mapping
from functools import cached_property
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import encode_jpeg

_NUM_FIELDS = 32
_QUALITY = 80
_NOISE = 10  # with the quality: about 23 KB at 384 x 384, as a photograph
_ORIENTATION = 0x0112

Pixels = NDArray[np.uint8]


class ImageDrawer:
    """Pictures by number: a smooth field and a rough one, both out of a few and both shifted, added up.

    The same (size, seed, number) gives the same bytes. A core draws about a thousand of 384 x 384 a second.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def pixels(self, number: int) -> Pixels:
        """uint8 [size, size, 3]."""
        rng = np.random.default_rng((self.seed, number))
        smooth, rough = (self._smooth[rng.integers(_NUM_FIELDS)], self._rough[rng.integers(_NUM_FIELDS)])
        shift = rng.integers(self.size, size=4)
        pixels = np.empty((self.size, self.size, 3), np.uint8)
        pixels[:] = _window(smooth, shift[0], shift[1], self.size)
        pixels += _window(rough, shift[2], shift[3], self.size)
        return pixels

    def jpeg(self, number: int) -> bytes:
        """The picture as a JPEG."""
        image = torch.from_numpy(self.pixels(number)).permute(2, 0, 1)
        encoded: Tensor = encode_jpeg(image, _QUALITY)
        return encoded.numpy().tobytes()

    @cached_property
    def _smooth(self) -> list[Pixels]:
        """Fields of 0 .. 255 - 2 * _NOISE, so that the sum of two does not overflow."""
        rng = np.random.default_rng((self.seed, 0, 1))
        coarse = torch.from_numpy(rng.integers(0, 256, (_NUM_FIELDS, 3, 12, 12), dtype=np.uint8))
        fields = functional.interpolate(coarse, size=(self.size, self.size), mode="bicubic", antialias=True)
        scaled = (fields.float() * ((255 - 2 * _NOISE) / 255)).to(torch.uint8)
        return [_tiled(field.permute(1, 2, 0).numpy()) for field in scaled]

    @cached_property
    def _rough(self) -> list[Pixels]:
        """Noise of 0 .. 2 * _NOISE - 1."""
        rng = np.random.default_rng((self.seed, 0, 2))
        shape = (self.size, self.size, 3)
        return [_tiled(rng.integers(0, 2 * _NOISE, shape, dtype=np.uint8)) for _ in range(_NUM_FIELDS)]


def _tiled(field: Pixels) -> Pixels:
    """The field twice in both directions: a shift of it is then a plain window."""
    return np.tile(field, (2, 2, 1))


def _window(field: Pixels, top: int, left: int, size: int) -> Pixels:
    return field[top : top + size, left : left + size]


def _saved(image: Image.Image, form: str, exif: Image.Exif | None = None) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    return _saved(image, "JPEG", exif)


def _deep(image: Image.Image) -> bytes:
    return _saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8), "PNG")


def _bomb(image: Image.Image) -> bytes:
    """A header that claims 20,000 x 20,000 pixels."""
    content = _saved(image, "JPEG")
    offset = content.index(b"\xff\xc0") + 5
    return content[:offset] + struct.pack(">HH", 20_000, 20_000) + content[offset + 4 :]


def _transparent(image: Image.Image) -> bytes:
    image.putalpha(image.convert("L"))
    return _saved(image, "PNG")


ODD_IMAGES: Mapping[str, Callable[[Image.Image], bytes]] = {
    "PNG": lambda image: _saved(image, "PNG"),
    "GIF": lambda image: _saved(image.quantize(), "GIF"),
    "WebP": lambda image: _saved(image, "WEBP"),
    "CMYK": lambda image: _saved(image.convert("CMYK"), "JPEG"),
    "16-bit": _deep,
    "transparent": _transparent,
    "turned": _turned,
    "1 x 1": lambda image: _saved(image.resize((1, 1)), "JPEG"),
}
"""Pictures that can be used, all under a name that ends in .jpg."""

BROKEN_IMAGES: Mapping[str, Callable[[Image.Image], bytes]] = {
    "cut short": lambda image: _saved(image, "JPEG")[:-200],
    "zero bytes": lambda image: b"",
    "HTML": lambda image: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n",
    "bomb": _bomb,
}
"""Files that are no picture."""
