"""Decoding, fitting against open_clip's own preprocessing, and batches with missing pictures."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from dsmip.data import images
from dsmip.data.images import JpegHeader, PixelForm, UnreadableImage, decode, fit, jpeg_header


def smooth_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")],
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    data = encoded(smooth_image(30, 20, mode), kind)
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 30)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((1, 2), (10, 20, 30, 255))
    pixels = decode(encoded(image, "PNG"))
    assert pixels[:, 2, 1].tolist() == [10, 20, 30]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_unreadable_pictures() -> None:
    data = encoded(smooth_image(80, 60))
    whole = data[:-2] + b"\xff\xd9"
    assert decode(whole).shape == (3, 60, 80)
    no_tables = data[:2] + data[data.index(b"\xff\xc0") :]
    for broken in (b"", b"not a picture", data[: len(data) // 2], data[:20], data[:-1], no_tables):
        with pytest.raises(UnreadableImage):
            decode(broken)


def pillows(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"quality": 30}]
)
@pytest.mark.parametrize("size", [(9, 5), (17, 9), (64, 64), (123, 80)])
def test_jpegs_are_decoded_as_pillow_decodes_them(size: tuple[int, int], options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    smooth_image(*size).save(stream, "JPEG", **options)
    data = stream.getvalue()
    header = jpeg_header(data)
    assert header is not None
    assert (header.width, header.height, header.channels, header.metadata) == (*size, 3, False)
    assert torch.equal(decode(data), pillows(data))
    damaged = bytearray(data)
    damaged[-4] ^= 0x55
    assert torch.equal(decode(bytes(damaged)), pillows(bytes(damaged)))


def test_only_whole_plain_jpegs_have_a_header() -> None:
    data = encoded(smooth_image(30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    smooth_image(30, 20).save(stream, "JPEG", exif=exif)
    assert jpeg_header(stream.getvalue()) == JpegHeader(30, 20, 3, metadata=True)
    assert jpeg_header(encoded(smooth_image(30, 20, "L"))) == JpegHeader(30, 20, 1, metadata=False)
    strange = [data[:-1], data + b"\n", data[:2] + b"\0" + data[2:], encoded(smooth_image(30, 20, "CMYK"))]
    for other in (*strange, b"", b"\xff\xd8\xff\xd9", data[:2] + b"\xff\xc0\xff\xd9"):
        assert jpeg_header(other) is None


def test_huge_pictures_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode(encoded(Image.new("RGB", (10, 10)))).shape == (3, 10, 10)
    # Cut after the header: only a decoder would notice that the pixels are missing.
    with pytest.raises(UnreadableImage, match="11 x 10 pixels are above the limit of 100"):
        decode(encoded(Image.new("RGB", (11, 10)), "PNG")[:44])
    with pytest.raises(UnreadableImage, match="11 x 10 pixels are above the limit of 100"):
        decode(encoded(Image.new("RGB", (11, 10))))


@pytest.mark.parametrize(
    ("width", "height"), [(90, 64), (64, 91), (300, 200), (123, 457), (40, 50), (64, 64), (150, 100)]
)
def test_fit_is_clips_preprocessing(width: int, height: int) -> None:
    image = smooth_image(width, height)
    transform = image_transform_v2(PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)
    expected = (transform(image) * 255).round()
    fitted = fit(decode(encoded(image, "PNG")), 64)
    assert fitted.dtype == torch.uint8
    assert fitted.shape == (3, 64, 64)
    difference = (fitted.float() - expected).abs()
    # Pillow and torch round differently; a picture cut to its centre first may shift by a part of a pixel.
    assert difference.max() <= (1 if max(width, height) < 3 * min(width, height) else 20)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_a_squashed_picture_is_seen_whole(name: Any) -> None:
    """As Pillow resizes it, whose filters torch follows within rounding."""
    wide = torch.randint(0, 256, (3, 30, 90), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    expected = Image.fromarray(wide.permute(1, 2, 0).numpy()).resize((16, 16), getattr(Image.Resampling, name.upper()))
    squashed = fit(wide, 16, PixelForm(resize="squash", filter=name))
    assert (squashed.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()).abs().max() <= 1
    assert not torch.equal(squashed, fit(wide, 16, PixelForm(filter=name)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (4000, 1), (3, 2000), (5000, 64)])
def test_extreme_shapes_fit(width: int, height: int) -> None:
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    assert torch.equal(fit(image, 32), torch.full((3, 32, 32), 77, dtype=torch.uint8))


def test_extreme_shapes_show_their_centre() -> None:
    image = torch.zeros(3, 10, 1000, dtype=torch.uint8)
    image[:, :, 480:520] = 200
    assert (fit(image, 32) == 200).all()
