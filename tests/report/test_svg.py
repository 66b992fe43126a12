"""Drawing: scales against arithmetic, ticks that are round, and texts that stay texts."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from steerguard.report import svg
from steerguard.report.svg import Frame, Scale


def test_a_scale_is_a_straight_line() -> None:
    scale = Scale(0, 100, 372, 28)
    assert (scale(0), scale(100), scale(25)) == (372, 28, pytest.approx(286))
    assert Scale(3, 3, 10, 30)(3) == 20  # one value stands in the middle


@pytest.mark.parametrize(
    ("low", "high", "n", "ticks"),
    [
        (0, 100, 5, [0, 20, 40, 60, 80, 100]),
        (60, 100, 5, [60, 70, 80, 90, 100]),
        (-2.5, 2, 4, [-2, 0, 2]),
        (0.0001, 0.0004, 3, [0.0001, 0.0002, 0.0003, 0.0004]),
        (7, 7, 4, [7]),
    ],
)
def test_ticks_are_round(low: float, high: float, n: int, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks(n) == pytest.approx(ticks)


def test_texts_and_attributes_are_escaped() -> None:
    hostile = '"><script>alert(1)</script>'
    for drawn in (
        svg.text(0, 0, hostile),
        svg.mark("circle", 0, 0, class_="dot", about=hostile),
        svg.picture(10, 10, hostile),
        svg.element("g", class_=hostile),
    ):
        assert "<script" not in drawn and "&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in drawn


@pytest.mark.parametrize("shape", svg.SHAPES)
def test_every_shape_is_drawn_about_its_point(shape: str) -> None:
    drawn = svg.mark(shape, 50, 50, class_="dot")
    if shape == "circle":
        assert 'cx="50" cy="50" r="4"' in drawn
        return
    path = re.search(r' d="([^"]+)"', drawn)
    assert path is not None
    first = re.match(r"M([\d.]+) ([\d.]+)", path[1])
    assert first is not None and all(abs(float(x) - 50) <= 5 for x in first.groups())
    others = [svg.mark(other, 50, 50, class_="dot") for other in svg.SHAPES if other != shape]
    assert drawn not in others


def test_the_ramp_grows_lighter_all_the_way() -> None:
    def light(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [light(svg.ramp(i / 50)) for i in range(51)]
    assert all(a < b for a, b in pairwise(shades))
    assert svg.ramp(-1) == svg.ramp(0) and svg.ramp(2) == svg.ramp(1)


def test_hatching_stays_in_its_cell() -> None:
    for x, y, w, h in ((10, 20, 60, 23), (10, 20, 4, 23)):
        drawn = svg.hatch([(x, y, w, h)])
        strokes = re.findall(r"M(-?[\d.]+) (-?[\d.]+)l(-?[\d.]+) (-?[\d.]+)", drawn)
        assert len(strokes) >= 1
        for start_x, start_y, dx, dy in (map(float, stroke) for stroke in strokes):
            assert x <= start_x and start_x + dx <= x + w + 0.02
            assert start_y <= y + h and start_y + dy >= y - 0.02
            assert dx > 0 > dy
    assert svg.hatch([]) == ""


def test_bars_and_whiskers_end_where_the_scale_says() -> None:
    drawn = svg.bar(Scale(0, 100, 70, 270), 0, 10, 40, (25, 75), class_="k0", about="")
    assert 'width="80"' in drawn and 'x1="120"' in drawn and 'x2="220"' in drawn
    assert "whisker" not in svg.bar(Scale(0, 100, 70, 270), 0, 10, 40, None, class_="k0", about="")


def test_an_empty_bin_is_not_drawn() -> None:
    frame = Frame(Scale(0, 3, 0, 30), Scale(0, 10, 100, 0))
    drawn = svg.histogram(frame, [0, 1, 2, 3], [5, 0, 10], class_="seen")
    assert drawn.count("<rect") == 2
    assert 'x="0" y="50" width="10" height="50"' in drawn
