"""Charts: points where their values are, round ticks, names as texts."""

import re
from xml.etree import ElementTree

import pytest

from dsmip.reporting.charts import Line, interval_marks, line_chart, share_bar, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.33), (-3.2, 1e4), (5, 5e-7 + 5)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert low <= min(found)
    assert max(found) <= high


def test_points_lie_where_their_values_are_and_names_are_texts() -> None:
    name = '<script>&"'
    lines = [Line("ideal", [(0, 0), (1, 1)], reference=True), Line(name, [(0, 0), (0.5, 1), (1, 0.5)])]
    figure = ElementTree.fromstring(line_chart(name, lines, x=name, y=name, x_range=(0, 1), y_range=(0, 1)))
    dots = [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in figure.iter("circle")]
    (left, bottom), (middle, top), (right, half) = dots  # none of the reference
    assert middle == pytest.approx((left + right) / 2)
    assert half == pytest.approx((bottom + top) / 2, abs=0.11)
    assert top < bottom
    assert {name, "ideal"} <= {each.tail for each in figure.iter("span")}


def test_a_line_without_extent_is_drawn() -> None:
    assert "nan" not in line_chart("flat", [Line("flat", [(1, 2.5)])], x="epoch", y="loss")


def test_intervals_and_shares() -> None:
    marks = interval_marks([(0.5, (0.25, 0.75)), (1.0, None)])
    (low, high) = map(float, re.findall(r'class="line s0" x1="([\d.]+)" x2="([\d.]+)"', marks)[0])
    first, second = map(float, re.findall(r'cx="([\d.]+)"', marks))
    assert low < first < high < second
    widths = re.findall(r' x="([\d.]+)" width="([\d.]+)"', share_bar([("a", 0.25), ("<b>", 0.75)]))
    assert widths == [("0.00", "25.00"), ("25.00", "75.00")]
