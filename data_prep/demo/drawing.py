"""Coats of arms drawn with PIL: the clean plate of a shield and its photograph. No fonts, no files.

All drawing happens on a canvas twice the asked size, in fractions of that canvas (x to the right, y down), and is
reduced at the end. Every random decision comes from the caller's `random.Random`: the same seed draws the same bytes.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeAlias

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from data_prep.demo.arms import TINCTURES, Arms, Colour, Damage

Points: TypeAlias = list[tuple[float, float]]

# Charge centres and half-size for one, two and three charges.
_CENTRES: Final[dict[int, tuple[float, Points]]] = {
    1: (0.2, [(0.5, 0.47)]),
    2: (0.155, [(0.325, 0.45), (0.675, 0.45)]),
    3: (0.145, [(0.33, 0.33), (0.67, 0.33), (0.5, 0.67)]),
}
_OVERSAMPLE: Final = 2
_PARCHMENT: Final[Colour] = (226, 218, 200)
_GROUNDS: Final[tuple[Colour, ...]] = (
    (226, 218, 200),
    (150, 148, 142),
    (134, 106, 78),
    (112, 128, 104),
    (168, 186, 204),
    (180, 140, 120),
    (92, 96, 108),
)
_WORN: Final[tuple[Colour, ...]] = ((160, 156, 148), (138, 128, 114), (182, 174, 160))


def plate(arms: Arms, size: int) -> bytes:
    """The canonical image of a shield: upright on parchment. JPEG, `size` x `size`."""
    canvas = Image.new("RGB", (size * _OVERSAMPLE,) * 2, _PARCHMENT)
    shield = _shield(arms, size * _OVERSAMPLE, "none", Random(0))
    canvas.paste(shield, (0, 0), shield)
    return _jpeg(canvas.resize((size, size), Image.Resampling.BOX), 90)


def photograph(arms: Arms, size: int, *, damage: Damage, roughness: float, rng: Random) -> bytes:
    """An image of a shield as found somewhere: moved, turned, lit, textured, blurred, sometimes behind a pole.

    Args:
        arms: The shield.
        size: Sides of the image in pixels.
        damage: What cannot be seen.
        roughness: Scales every perturbation; 0: only the ground changes.
        rng: Draws the perturbations.

    Returns:
        A JPEG.
    """
    side = size * _OVERSAMPLE
    canvas = _ground(side, rng)
    shield = _moved(_shield(arms, side, damage, rng), roughness, rng)
    canvas.paste(shield, (0, 0), shield)
    if rng.random() < 0.3 * roughness:
        _draw_pole(canvas, rng)
    image = _lit(canvas, roughness, rng).resize((size, size), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7) * roughness))
    noise = Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size))
    return _jpeg(Image.blend(image, noise, rng.uniform(0, 0.1) * roughness), rng.randint(72, 92))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _scaled(points: Sequence[tuple[float, float]], side: int) -> Points:
    return [(x * side, y * side) for x, y in points]


def _outline(inset: float) -> Points:
    """The shield's edge as a polygon, `inset` inside the full one: straight flanks that curve to a point."""
    left, right, top, tip = 0.1 + inset, 0.9 - inset, 0.05 + inset, 0.96 - 1.3 * inset
    knee = 0.5
    steps = [step / 12 for step in range(13)]
    flank = [
        (0.5 + (right - 0.5) * math.cos(t * math.pi / 2) ** 0.8, knee + (tip - knee) * math.sin(t * math.pi / 2))
        for t in steps
    ]
    return [(left, top), (right, top), *flank, *[(1 - x, y) for x, y in reversed(flank)]]


def _shield(arms: Arms, side: int, damage: Damage, rng: Random) -> Image.Image:
    """The upright shield as an RGBA layer."""
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon(_scaled(_outline(0), side), fill=255)
    layer = Image.new("RGB", (side, side), TINCTURES[arms.border or arms.field])
    if arms.border:
        inner = Image.new("L", (side, side), 0)
        ImageDraw.Draw(inner).polygon(_scaled(_outline(0.085), side), fill=255)
        layer.paste(_field(arms, side), (0, 0), inner)
    else:
        layer.paste(_field(arms, side))
    draw = ImageDraw.Draw(layer)
    half, centres = _CENTRES[arms.count]
    for x, y in centres:
        _draw_charge(draw, arms, _Frame(x * side, y * side, half * side))
    outline = _scaled(_outline(0), side)
    draw.line([*outline, outline[0]], fill=(40, 36, 32), width=max(2, side // 48))
    if damage == "charges":
        for x, y in centres:
            _draw_blot(draw, x * side, y * side, half * side * 1.15, rng)
    elif damage == "border":
        for x, y in _along(_outline(0.04)):
            _draw_blot(draw, x * side, y * side, 0.085 * side, rng)
    layer.putalpha(mask)
    return layer


def _field(arms: Arms, side: int) -> Image.Image:
    """The field without border or charges."""
    field = Image.new("RGB", (side, side), TINCTURES[arms.field])
    draw = ImageDraw.Draw(field)
    for shape in _second_tincture(arms.pattern):
        draw.polygon(_scaled(shape, side), fill=TINCTURES[arms.second])
    return field


def _second_tincture(pattern: str) -> list[Points]:
    """The polygons of a pattern that carry the second tincture."""
    if pattern == "plain":
        return []
    if pattern == "pale":
        return [_box(0.5, 0, 1, 1)]
    if pattern == "fess":
        return [_box(0, 0.47, 1, 1)]
    if pattern == "bend":
        return [[(0.1, 0), (1, 0), (1, 0.92)]]
    if pattern == "quarterly":
        return [_box(0.5, 0, 1, 0.47), _box(0, 0.47, 0.5, 1)]
    if pattern == "barry":
        return [_box(0, top, 1, top + 0.15) for top in (0.2, 0.5, 0.8)]
    if pattern == "chevron":
        return [[(0.5, 0.34), (1, 0.78), (1, 1.04), (0.5, 0.6), (0, 1.04), (0, 0.78)]]
    return [_box(0.39, 0, 0.61, 1), _box(0, 0.36, 1, 0.58)]


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a charge is drawn: centre and half-size in pixels; shapes are given in -1..1."""

    x: float
    y: float
    half: float

    def points(self, shape: Points) -> Points:
        return [(self.x + self.half * x, self.y + self.half * y) for x, y in shape]

    def circle(self, x: float, y: float, radius: float) -> tuple[float, float, float, float]:
        centre_x, centre_y, reach = self.x + self.half * x, self.y + self.half * y, self.half * radius
        return (centre_x - reach, centre_y - reach, centre_x + reach, centre_y + reach)


def _turn(radius: float, turn: float) -> tuple[float, float]:
    """A point at `turn` (fraction of a circle, clockwise from the top)."""
    return (radius * math.sin(turn * math.tau), -radius * math.cos(turn * math.tau))


def _crescent() -> Points:
    outer = [_turn(0.95, 0.5 + (step - 8) / 24) for step in range(17)]
    inner = [(x * 0.8, y * 0.62 - 0.3) for x, y in reversed(outer)]
    return [*outer, *inner]


def _heart() -> Points:
    angles = [step / 24 * math.tau for step in range(24)]
    return [
        (
            math.sin(a) ** 3 * 0.95,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16.5,
        )
        for a in angles
    ]


def _mirrored(half: Points) -> Points:
    """A closed shape that is the same on both sides: the right half from top to bottom, then its mirror image."""
    return [*half, *[(-x, y) for x, y in reversed(half)]]


_SHAPES: Final[dict[str, list[Points]]] = {
    "star": [[_turn(1.0 if step % 2 == 0 else 0.42, step / 10) for step in range(10)]],
    "crescent": [_crescent()],
    "diamond": [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]],
    "heart": [_heart()],
    "tower": [
        _mirrored(
            [(0.18, -0.9), (0.18, -0.55), (0.4, -0.55), (0.4, -0.9), (0.7, -0.9), (0.7, -0.2), (0.5, -0.2), (0.5, 0.95)]
        )
    ],
    "tree": [[(-0.16, 0.3), (0.16, 0.3), (0.16, 1), (-0.16, 1)], [(0, -1), (0.85, 0.5), (-0.85, 0.5)]],
    "bird": [_mirrored([(0, -0.5), (0.2, -0.15), (0.6, -0.75), (1, -0.3), (0.7, 0.25), (0.2, 0.3), (0.4, 0.9)])],
    "sword": [_mirrored([(0, -1), (0.2, -0.75), (0.2, 0.3), (0.65, 0.3), (0.65, 0.58), (0.2, 0.58), (0.2, 1)])],
    "crown": [_mirrored([(0, -0.8), (0.4, -0.05), (0.95, -0.65), (0.75, 0.7)])],
    "cup": [_mirrored([(0.8, -0.9), (0.7, -0.2), (0.18, 0.15), (0.18, 0.65), (0.6, 0.95)])],
}


def _draw_charge(draw: ImageDraw.ImageDraw, arms: Arms, frame: _Frame) -> None:
    colour = TINCTURES[arms.charge_colour]
    edge = (240, 240, 236) if arms.charge_colour == "black" else (24, 22, 20)
    width = max(1, round(frame.half / 11))
    if arms.charge == "ball":
        draw.ellipse(frame.circle(0, 0, 0.85), fill=colour, outline=edge, width=width)
    elif arms.charge == "ring":
        draw.ellipse(frame.circle(0, 0, 0.95), outline=edge, width=width + round(0.5 * frame.half))
        draw.ellipse(
            frame.circle(0, 0, 0.95 - width / frame.half), outline=colour, width=round(0.5 * frame.half) - width
        )
    else:
        for shape in _SHAPES[arms.charge]:
            draw.polygon(frame.points(shape), fill=colour, outline=edge, width=width)


def _along(outline: Points) -> Points:
    """Points along a closed polygon, close enough for blots at each to leave no gap."""
    points: Points = []
    for (x0, y0), (x1, y1) in zip(outline, [*outline[1:], outline[0]], strict=True):
        steps = max(1, round(math.dist((x0, y0), (x1, y1)) / 0.06))
        points += [(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps) for step in range(steps)]
    return points


def _draw_blot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, rng: Random) -> None:
    """A ragged worn patch that covers at least the circle of this radius."""
    ring = [_turn(rng.uniform(1.05, 1.2) * radius, step / 14) for step in range(14)]
    draw.polygon([(x + dx, y + dy) for dx, dy in ring], fill=rng.choice(_WORN))


def _ground(side: int, rng: Random) -> Image.Image:
    """A background: one colour, coarse or fine texture."""
    grain = rng.choice((4, 8, 16))
    texture = Image.frombytes("L", (side // grain,) * 2, rng.randbytes((side // grain) ** 2))
    cover = texture.resize((side, side), Image.Resampling.BILINEAR).convert("RGB")
    return Image.blend(Image.new("RGB", (side, side), rng.choice(_GROUNDS)), cover, rng.uniform(0.1, 0.3))


def _moved(shield: Image.Image, roughness: float, rng: Random) -> Image.Image:
    """The layer scaled, turned and shifted about its centre in one resampling."""
    side = shield.width
    scale = 1 - rng.uniform(0, 0.22) * roughness
    angle = math.radians(rng.uniform(-14, 14) * roughness)
    shift_x, shift_y = (rng.uniform(-0.07, 0.07) * roughness * side for _ in range(2))
    cos, sin, middle = math.cos(angle) / scale, math.sin(angle) / scale, side / 2
    offset_x = middle - cos * (middle + shift_x) - sin * (middle + shift_y)
    offset_y = middle + sin * (middle + shift_x) - cos * (middle + shift_y)
    inverse = (cos, sin, offset_x, -sin, cos, offset_y)
    return shield.transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)


def _draw_pole(canvas: Image.Image, rng: Random) -> None:
    """A dark pole or branch across one side of the image."""
    side = canvas.width
    foot, head = rng.uniform(0.1, 0.9) * side, rng.uniform(-0.3, 0.3) * side
    ends = (
        [(foot, float(side)), (foot + head, 0.0)] if rng.random() < 0.5 else [(0.0, foot), (float(side), foot + head)]
    )
    shade = rng.randint(40, 110)
    ImageDraw.Draw(canvas).line(ends, fill=(shade, shade - 10, shade - 24), width=round(rng.uniform(0.04, 0.08) * side))


def _lit(canvas: Image.Image, roughness: float, rng: Random) -> Image.Image:
    """The canvas under light from one of four sides, brighter or darker as a whole."""
    depth = rng.uniform(0, 0.4) * roughness
    level = 1 - rng.uniform(0, 0.2) * roughness
    ramp = Image.linear_gradient("L").resize(canvas.size).rotate(rng.choice((0, 90, 180, 270)))
    light = ramp.point([round(255 * level * (1 - depth * (1 - value / 255))) for value in range(256)])
    return ImageChops.multiply(canvas, light.convert("RGB"))
