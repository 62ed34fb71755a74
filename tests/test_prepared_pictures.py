"""Raw pictures to prepared JPEGs."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from small_release import picture

from data_prep import pictures
from data_prep.pictures import UnusablePicture, prepare_picture


def _opened(content: bytes) -> Image.Image:
    image = Image.open(BytesIO(content))
    image.load()
    assert image.format == "JPEG"
    assert image.mode == "RGB"
    return image


def test_a_small_jpeg_is_kept_as_it_is() -> None:
    content = picture((224, 300))
    assert prepare_picture(content, 224) is content


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 500), (448, 224)), ((500, 1000), (224, 448)), ((225, 225), (224, 224)), ((2000, 20), (80, 20))],
)
def test_the_shorter_side_is_bounded_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert _opened(prepare_picture(picture(size), 224)).size == expected
    assert _opened(prepare_picture(picture(size, form="PNG"), 224)).size == expected


def test_a_panorama_keeps_its_centre() -> None:
    image = Image.new("RGB", (1000, 10), "red")
    image.paste("blue", (480, 0, 520, 10))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    assert np.asarray(_opened(prepare_picture(buffer.getvalue(), 224)))[..., 2].mean() > 240


def test_transparency_becomes_white() -> None:
    content = picture((9, 9), (10, 20, 30, 0), "PNG", "RGBA")  # type: ignore[arg-type]
    assert np.asarray(_opened(prepare_picture(content, 224))).min() > 250


def test_sideways_photographs_are_turned_upright() -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    turned = _opened(prepare_picture(buffer.getvalue(), 224))
    assert turned.size == (20, 40)
    assert not turned.getexif().get(0x0112)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    content = picture((20, 20), 0, "JPEG", mode)  # type: ignore[arg-type]
    _opened(prepare_picture(content, 224))


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    buffer = BytesIO()
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(buffer, "PNG")
    assert abs(np.asarray(_opened(prepare_picture(buffer.getvalue(), 224))).mean() - 128) < 3


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", picture((64, 64))[:-100], picture((999, 999))[:-100], b"%!PS-Adobe EPSF-3.0\n"],
)
def test_what_cannot_be_read_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnusablePicture, match="unreadable"):
        prepare_picture(content, 224)


def test_pixels_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    with pytest.raises(UnusablePicture, match="too large"):
        prepare_picture(picture((10, 10)), 224)
    monkeypatch.undo()
    bomb = picture((1, 1), form="PNG")
    header = bomb[:16] + (60000).to_bytes(4, "big") * 2 + bomb[24:]
    with pytest.raises(UnusablePicture):
        prepare_picture(header, 224)
