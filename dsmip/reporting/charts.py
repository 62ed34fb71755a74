"""Charts as SVG inside a page, which takes their colours from its style sheet: lines, intervals, shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_TICKS = 5
_INTERVAL_WIDTH, _INTERVAL_HEIGHT = 140, 12
NUM_COLOURS = 6  # .s0 ... of the style sheet


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart.

    Attributes:
        name: In the legend.
        points: (x, y), from left to right.
        weights: How many each point stands for; dots are of that area. None: plain dots where there are few points.
        reference: It is what others are compared with: dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    weights: Sequence[float] | None = None
    reference: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    counts: bool = False,
) -> Markup:
    """A figure with axes, lines, dots that say their values, and a legend where there are several lines.

    Args:
        title: Its name.
        lines: What is drawn.
        x, y: Names of the axes.
        x_range, y_range: From and to (default: all points).
        counts: x counts something: no ticks between whole numbers.
    """
    xs, ys = ([point[side] for line in lines for point in line.points] for side in (0, 1))
    x_low, x_high = x_range or _padded(xs)
    y_low, y_high = y_range or _padded(ys)

    def at_x(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y_low, y_high):
        place = f"{at_y(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at_y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x_low, x_high):
        if counts and value % 1:
            continue
        parts.append(f'<text x="{at_x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    high = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text transform="translate(11 {high}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    colours = _colours(lines)
    for line, colour in zip(lines, colours, strict=True):
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        parts += [
            f'<circle class="dot {colour}" cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="{radius:.1f}">'
            f"<title>{escape(line.name)}: {a:g}, {b:.4g}</title></circle>"
            for (a, b), radius in zip(line.points, _radii(line), strict=False)
        ]
    frame = f'class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"'
    svg = f"<svg {frame}>{''.join(parts)}</svg>"
    legend = "".join(
        f'<span class="key"><span class="swatch {colour}"></span>{escape(line.name)}</span>'
        for line, colour in zip(lines, colours, strict=True)
    )
    legend = f"<div>{legend}</div>" if len(lines) > 1 else ""
    return Markup(f"<figure>{svg}<figcaption><strong>{escape(title)}</strong>{legend}</figcaption></figure>")


def interval_marks(marks: Sequence[tuple[float, tuple[float, float] | None]]) -> Markup:
    """Shares with their intervals on a scale from 0 to 1, one below the other."""
    height = _INTERVAL_HEIGHT * len(marks)
    parts = [
        f'<line class="grid" x1="{_scaled(at):.1f}" x2="{_scaled(at):.1f}" y1="0" y2="{height}"/>' for at in (0, 0.5, 1)
    ]
    for number, (value, interval) in enumerate(marks):
        middle = _INTERVAL_HEIGHT * (number + 0.5)
        if interval is not None:
            low, high = map(_scaled, interval)
            parts.append(f'<line class="line s{number}" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<circle class="dot s{number}" cx="{_scaled(value):.1f}" cy="{middle}" r="3.5"/>')
    return Markup(
        f'<svg class="marks" viewBox="0 0 {_INTERVAL_WIDTH} {height}" width="{_INTERVAL_WIDTH}" height="{height}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def share_bar(shares: Sequence[tuple[str, float]]) -> Markup:
    """Shares that add up to 1 as one bar; each says its name and share."""
    parts, start = [], 0.0
    for number, (name, share) in enumerate(shares):
        parts.append(
            f'<rect class="fill s{number % NUM_COLOURS}" x="{100 * start:.2f}" width="{100 * share:.2f}" height="8">'
            f"<title>{escape(name)}: {share:.3f}</title></rect>"
        )
        start += share
    label = escape(", ".join(f"{name} {share:.3f}" for name, share in shares))
    return Markup(
        f'<svg class="shares" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(1.2, 6.6)
    [2.0, 4.0, 6.0]
    """
    rough = (high - low) / _TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.99)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(round(number * step, 12)) for number in range(first, last + 1)]


def _colours(lines: Sequence[Line]) -> list[str]:
    found, number = [], 0
    for line in lines:
        again = " again" if number >= NUM_COLOURS else ""  # the colours have been used up
        found.append("reference" if line.reference else f"s{number % NUM_COLOURS}{again}")
        number += not line.reference
    return found


def _radii(line: Line) -> list[float]:
    """Of a line's dots; none where it has many points, or is a reference."""
    if line.reference:
        return []
    if line.weights is not None:
        largest = max(line.weights, default=1) or 1
        return [2 + 6 * math.sqrt(weight / largest) for weight in line.weights]
    return [3.0] * len(line.points) if len(line.points) <= 40 else []


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _scaled(share: float) -> float:
    return 5 + share * (_INTERVAL_WIDTH - 10)
