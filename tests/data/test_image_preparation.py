"""Raw pictures to prepared JPEGs."""

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from dsmip.data import image_preparation
from dsmip.data.image_preparation import JPEG_QUALITY, UnusableImage, prepare_image
from dsmip.data.images import UnreadableImage, decode, jpeg_header
from dsmip.data.manifest import ImageSettings
from tests.support.small_release import image_bytes

SETTINGS = ImageSettings(size=224, quality=JPEG_QUALITY)
ORIGINAL = SETTINGS.model_copy(update={"keep_original": True})


def _opened(content: bytes) -> Image.Image:
    image = Image.open(BytesIO(content))
    image.load()
    assert image.format == "JPEG"
    return image


def _pixels(content: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    image = _opened(content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def _photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def _saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _claiming(content: bytes, width: int, height: int) -> bytes:
    """The same JPEG or PNG with other sides in its header."""
    if content.startswith(b"\x89PNG"):
        return content[:16] + struct.pack(">II", width, height) + content[24:]
    offset = content.index(b"\xff\xc0") + 5
    return content[:offset] + struct.pack(">HH", height, width) + content[offset + 4 :]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 500), (448, 224)),
        ((500, 1000), (224, 448)),
        ((225, 225), (224, 224)),
        ((2000, 20), (80, 20)),
        ((950, 900), (236, 224)),
        ((1, 1), (1, 1)),
        ((20, 30), (20, 30)),
    ],
)
def test_the_shorter_side_is_bounded_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for form in ("JPEG", "PNG"):
        assert _opened(prepare_image(image_bytes(size, form=form), SETTINGS)).size == expected
        assert _opened(prepare_image(image_bytes(size, form=form), ORIGINAL)).size == size


PHOTO, BLACK = _photo(60, 40), Image.new("RGB", (60, 40))
READABLE: dict[str, tuple[bytes, Image.Image]] = {
    "png": (_saved(PHOTO, "PNG"), PHOTO),
    "gif": (_saved(PHOTO.quantize(), "GIF"), PHOTO.quantize().convert("RGB")),
    "moving gif": (_saved(BLACK.quantize(), "GIF", save_all=True, append_images=[PHOTO.quantize()]), BLACK),
    "webp": (_saved(PHOTO, "WEBP", lossless=True), PHOTO),
    "bmp": (_saved(PHOTO, "BMP"), PHOTO),
    "tiff": (_saved(PHOTO, "TIFF"), PHOTO),
    "grey jpeg": (_saved(PHOTO.convert("L")), PHOTO.convert("L").convert("RGB")),
    "cmyk jpeg": (_saved(PHOTO.convert("CMYK"), quality=95), PHOTO),
    "progressive jpeg": (_saved(PHOTO, progressive=True, quality=95), PHOTO),
    "jpeg and more": (_saved(PHOTO, quality=95) + b"\r\n", PHOTO),
    "turned jpeg": (
        _saved(PHOTO.transpose(Image.Transpose.ROTATE_90), exif=_turned(6), quality=95, subsampling=0),
        PHOTO,
    ),
    "16-bit grey": (
        _saved(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257), "PNG"),
        PHOTO.convert("L").convert("RGB"),
    ),
    "transparent": (_saved(Image.new("RGBA", (60, 40), (10, 20, 30, 0)), "PNG"), Image.new("RGB", (60, 40), "white")),
    "half transparent": (
        _saved(Image.new("RGBA", (60, 40), (0, 0, 0, 128)), "PNG"),
        Image.new("RGB", (60, 40), (127, 127, 127)),
    ),
}


@pytest.mark.parametrize("settings", [SETTINGS, ORIGINAL], ids=["resized", "original"])
@pytest.mark.parametrize("name", READABLE)
def test_every_kind_shows_what_it_showed(name: str, settings: ImageSettings) -> None:
    content, expected = READABLE[name]
    prepared = _opened(prepare_image(content, settings))
    assert prepared.size == expected.size
    assert prepared.getexif().get(0x0112, 1) == 1
    difference = np.asarray(prepared.convert("RGB")).astype(np.int64) - np.asarray(expected)
    assert abs(difference).mean() < 8  # JPEG halves the colours' resolution


def test_what_decodes_and_fits_is_kept_as_it_is() -> None:
    plain = image_bytes((224, 300))
    assert prepare_image(plain, SETTINGS) is plain
    grey, tiny = image_bytes((9, 9), "black", mode="L"), image_bytes((2, 2))
    kept = [_saved(PHOTO, exif=_turned(1)), READABLE["progressive jpeg"][0], READABLE["jpeg and more"][0]]
    for content in kept:
        assert prepare_image(content, SETTINGS) is content
    for content in (*kept, grey, image_bytes((999, 999))):
        assert prepare_image(content, ORIGINAL) is content
    assert _pixels(prepare_image(grey, SETTINGS)).max() < 5  # all prepared pictures are RGB
    stuffed = tiny[:2] + b"\xff\xfe\xff\xff" + bytes(65533) + tiny[2:]
    assert len(prepare_image(stuffed, SETTINGS)) < 1000


def test_every_path_gives_the_same_picture() -> None:
    image = _photo(640, 480)
    reference = np.asarray(image.resize((299, 224), Image.Resampling.BICUBIC)).astype(np.int64)
    forms: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("JPEG", {"quality": 98}), ("BMP", {})]
    for form, options in forms:
        pixels = _pixels(prepare_image(_saved(image, form, **options), SETTINGS))
        assert abs(pixels - reference).mean() < 1.5
    large = _photo(1600, 1200)  # decoded at half of its size
    half = np.asarray(large.resize((299, 224), Image.Resampling.BICUBIC)).astype(np.int64)
    assert abs(_pixels(prepare_image(_saved(large, quality=98), SETTINGS)) - half).mean() < 1.5


def test_quality_is_the_one_asked_for() -> None:
    content = _saved(_photo(640, 480), "PNG")
    sizes = [len(prepare_image(content, ImageSettings(size=224, quality=quality))) for quality in (40, 80, 95)]
    assert sizes == sorted(set(sizes))


def test_a_panorama_keeps_its_centre() -> None:
    image = Image.new("RGB", (1000, 10), "red")
    image.paste("blue", (480, 0, 520, 10))
    assert _pixels(prepare_image(_saved(image, "PNG"), SETTINGS))[..., 2].mean() > 240


BASE, SMALL = image_bytes((999, 999)), _saved(PHOTO)
UNREADABLE: dict[str, bytes] = {
    "zero bytes": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "postscript": b"%!PS-Adobe EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "cut": BASE[:-100],
    "cut, small": SMALL[:-100],
    "cut by its last byte": SMALL[:-1],
    "cut in its header": SMALL[:60],
    "markers only": SMALL[:2] + SMALL[-2:],
    "cut with a thumbnail": SMALL[:2] + b"\xff\xe1\x00\x0aExif\0\0\xff\xd9",
    "cut png": READABLE["png"][0][:-40],
    "cut gif": READABLE["gif"][0][:100],
    "cut webp": READABLE["webp"][0][:-40],
    "zero sides": _claiming(SMALL, 0, 40),
    "no tables": SMALL[:2] + SMALL[SMALL.index(b"\xff\xc0") :],
}


@pytest.mark.parametrize("settings", [SETTINGS, ORIGINAL], ids=["resized", "original"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_unreadable(name: str, settings: ImageSettings) -> None:
    with pytest.raises(UnusableImage, match="picture unreadable"):
        prepare_image(UNREADABLE[name], settings)


@pytest.mark.parametrize("settings", [SETTINGS, ORIGINAL], ids=["resized", "original"])
@pytest.mark.parametrize(
    "content",
    [
        _claiming(SMALL, 20_000, 20_000),
        _claiming(SMALL, 65_000, 65_000),
        _claiming(SMALL, 20_000, 20_000)[:-100],
        _claiming(image_bytes((1, 1), form="PNG"), 20_000, 20_000),
        _claiming(image_bytes((1, 1), form="PNG"), 9000, 9000),
    ],
)
def test_pixels_are_bounded_before_decoding(content: bytes, settings: ImageSettings) -> None:
    with pytest.raises(UnusableImage):
        prepare_image(content, settings)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_the_decoder_can() -> None:
    prepared = _opened(prepare_image(_saved(PHOTO, "AVIF", quality=95), SETTINGS))
    assert prepared.size == PHOTO.size
    assert abs(np.asarray(prepared).astype(np.int64) - np.asarray(PHOTO)).mean() < 8


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    large = _photo(1600, 1200)
    whole = prepare_image(_saved(large, quality=98), SETTINGS)
    monkeypatch.setattr(image_preparation, "MAX_PIXELS", 1_000_000)  # in the place of 64 million: below 1600 x 1200
    assert abs(_pixels(prepare_image(_saved(large, quality=98), SETTINGS)) - _pixels(whole)).max() == 0
    turned = _saved(large.transpose(Image.Transpose.ROTATE_90), exif=_turned(6), quality=98)
    assert _opened(prepare_image(turned, SETTINGS)).size == (299, 224)
    refused = [
        (_saved(large, progressive=True), SETTINGS),  # is held whole
        (_saved(large, "PNG"), SETTINGS),
        (_saved(large), ORIGINAL),
        (_saved(large), SETTINGS.model_copy(update={"size": 500})),  # needs more than half of its size
    ]
    for content, chosen in refused:
        with pytest.raises(UnusableImage, match="too large"):
            prepare_image(content, chosen)
    monkeypatch.setattr(image_preparation, "MAX_REDUCED_PIXELS", 1_900_000)
    with pytest.raises(UnusableImage, match="too large"):
        prepare_image(_saved(large), SETTINGS)


def test_too_large_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableImage, match="too large"):
        prepare_image(image_bytes((1, 70_000), form="PNG"), ORIGINAL)  # no JPEG is that long
    assert _opened(prepare_image(image_bytes((1, 70_000), form="PNG"), SETTINGS)).size == (1, 4)
    for name, limit in (("MAX_PIXELS", 99), ("MAX_FILE_BYTES", 600)):
        monkeypatch.setattr(image_preparation, name, limit)
        for content in (image_bytes((10, 10)), READABLE["png"][0] + bytes(600)):
            with pytest.raises(UnusableImage, match="too large"):
                prepare_image(content, SETTINGS)
        monkeypatch.undo()


FUZZED = [
    *[content for content, _ in READABLE.values()],
    SMALL,
    _saved(PHOTO, exif=_turned(1)),
    _saved(_photo(90, 70), subsampling=0),
]


@given(
    base=st.sampled_from(FUZZED),
    changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 3000)),
    settings=st.sampled_from([SETTINGS.model_copy(update={"size": 16}), ORIGINAL]),
)
def test_broken_bytes_give_a_jpeg_within_bounds_or_a_reason(
    base: bytes, changes: list[tuple[int, int]], cut: int | None, settings: ImageSettings
) -> None:
    content = bytearray(base)
    for offset, value in changes:
        content[offset % len(content)] = value
    data = bytes(content[:cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_preparation, "MAX_PIXELS", 1 << 20)  # keeps wild sizes cheap
        prepared = _or_none(lambda: prepare_image(data, settings), UnusableImage)
        if cut is not None and cut < len(base) and not changes and jpeg_header(base):
            assert prepared is None
        if prepared is not None:
            image = _opened(prepared)
            short, long = sorted(image.size)
            assert settings.keep_original or (short <= 16 and long <= 4 * short)
            assert decode(prepared).shape == (3, image.height, image.width)
        patch.setattr("dsmip.data.images.MAX_PIXELS", 1 << 20)
        _or_none(lambda: decode(data), UnreadableImage)


def _or_none(work: Callable[[], Any], error: type[Exception]) -> Any:
    try:
        return work()
    except error:
        return None
