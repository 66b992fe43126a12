"""Drawing: inline SVG from a few small functions, with nothing fetched and nothing run.

What this module knows: elements, scales, axes, lines, marks, cells, bars and histograms. It refuses to know what the
numbers mean. Every text is escaped here, once; colours come from the page's style sheet by class, so that one picture
serves light and dark. A mark's figures are in its `<title>`, which a pointer that rests on it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

SHAPES = ("circle", "triangle", "square", "diamond", "down", "cross")
"""Marks that are told apart without their colour."""

Point = tuple[float, float]
"x and y, in units of the picture"


def element(tag: str, *children: Markup | str, **attributes: str | float | None) -> Markup:
    """One element. `class_` is class, `_` in a name is `-`; an attribute of None is left out; text is escaped."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{tag}{given}>{inside}</{tag}>" if inside else f"<{tag}{given}/>")


def group(*children: Markup, class_: str | None = None) -> Markup:
    return element("g", *children, class_=class_)


def picture(width: float, height: float, label: str, *children: Markup, class_: str | None = None) -> Markup:
    """The whole picture; `label` says in words what it shows, for those who do not see it."""
    return element("svg", *children, viewBox=f"0 0 {_text(width)} {_text(height)}", role="img", aria_label=label, class_=class_)


def title(text: str) -> Markup:
    return element("title", text)


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    return element("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(
    x: float, y: float, width: float, height: float, *, class_: str | None = None, about: str = "", fill: str | None = None
) -> Markup:
    inside = [title(about)] if about else []
    return element("rect", *inside, x=x, y=y, width=max(0.0, width), height=max(0.0, height), fill=fill, class_=class_)


def polyline(points: Sequence[Point], *, class_: str) -> Markup:
    """A line through points; nothing for fewer than two."""
    if len(points) < 2:
        return Markup("")
    return element("polyline", points=" ".join(f"{_text(x)},{_text(y)}" for x, y in points), class_=class_)


# -------------------------------------------------------------------------------------------------- scales and axes


@dataclass(frozen=True)
class Scale:
    """A straight line from values to units of the picture."""

    low: float
    high: float
    start: float
    "where `low` stands"
    end: float
    "where `high` stands"

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = 0.5 if span == 0 else (value - self.low) / span
        return self.start + share * (self.end - self.start)

    def ticks(self, n: int) -> list[float]:
        """At most about n round values within the scale."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        rough = span / max(1, n)
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """The part of a picture that a plot fills, and its two scales; y grows upwards."""

    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Point:
        return self.x(x), self.y(y)

    def across(self, y: float, *, class_: str) -> Markup:
        """A horizontal line at a value."""
        return line(self.x.start, self.y(y), self.x.end, self.y(y), class_=class_)

    def upright(self, x: float, *, class_: str) -> Markup:
        """A vertical line at a value."""
        return line(self.x(x), self.y.start, self.x(x), self.y.end, class_=class_)


def axis_left(frame: Frame, ticks: Sequence[float], *, label: str = "") -> Markup:
    """Light lines across, their values at the left, and what they are above them."""
    parts = [frame.across(tick, class_="grid") for tick in ticks]
    parts += [text(frame.x.start - 7, frame.y(tick) + 4, plain(tick), anchor="end", class_="tick") for tick in ticks]
    if label:
        parts.append(text(frame.x.start, frame.y.end - 9, label, class_="axis"))
    return group(*parts)


def axis_bottom(frame: Frame, ticks: Sequence[float], *, label: str = "") -> Markup:
    """The line at the bottom, its values, and what they are below them."""
    y = frame.y.start
    parts = [line(frame.x.start, y, frame.x.end, y, class_="base")]
    for tick in ticks:
        parts += [line(frame.x(tick), y, frame.x(tick), y + 4, class_="base")]
        parts += [text(frame.x(tick), y + 17, plain(tick), anchor="middle", class_="tick")]
    if label:
        parts.append(text((frame.x.start + frame.x.end) / 2, y + 35, label, anchor="middle", class_="axis"))
    return group(*parts)


# ----------------------------------------------------------------------------------------------------------- marks


def mark(shape: str, x: float, y: float, *, size: float = 4.0, class_: str, about: str = "") -> Markup:
    """One mark of about `size` units to each side."""
    inside = [title(about)] if about else []
    if shape == "circle":
        return element("circle", *inside, cx=x, cy=y, r=size, class_=class_)
    return element("path", *inside, d=_outline(shape, x, y, size), class_=class_)


def _outline(shape: str, x: float, y: float, size: float) -> str:
    s, wide = size * 0.9, size * 1.25
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -wide), (wide, s), (-wide, s)],
        "down": [(0, wide), (wide, -s), (-wide, -s)],
        "diamond": [(0, -wide), (wide, 0), (0, wide), (-wide, 0)],
    }
    if shape not in corners:  # a cross
        return f"M{_text(x - s)} {_text(y - s)}l{_text(2 * s)} {_text(2 * s)}m0 {_text(-2 * s)}l{_text(-2 * s)} {_text(2 * s)}"
    return "M" + "L".join(f"{_text(x + dx)} {_text(y + dy)}" for dx, dy in corners[shape]) + "Z"


def ring(x: float, y: float, *, size: float = 9.0, class_: str = "ring") -> Markup:
    """A circle about a mark that was chosen."""
    return element("circle", cx=x, cy=y, r=size, class_=class_)


def hatch(cells: Iterable[tuple[float, float, float, float]], *, apart: float = 9.0) -> Markup:
    """Slanted strokes over each (x, y, width, height), all in one path; one from corner to corner of a narrow cell."""
    strokes = []
    for x, y, w, h in cells:
        if w <= h:
            strokes.append(f"M{_text(x)} {_text(y + h)}l{_text(w)} {_text(-h)}")
            continue
        for i in range(math.floor((w + h) / apart)):
            foot = (i + 0.5) * apart - h  # where the stroke would leave the cell's bottom, from its left edge
            low, high = max(0.0, -foot), min(h, w - foot)  # the part of the stroke that is within the cell
            strokes.append(f"M{_text(x + foot + low)} {_text(y + h - low)}l{_text(high - low)} {_text(low - high)}")
    return element("path", d="".join(strokes), class_="hatch") if strokes else Markup("")


def bar(
    scale: Scale, y: float, thickness: float, value: float, interval: tuple[float, float] | None, *, class_: str, about: str
) -> Markup:
    """A horizontal bar from the scale's low end to a value, and its interval as a line with two ends."""
    parts = [rect(scale.start, y, scale(value) - scale.start, thickness, class_=f"bar {class_}", about=about)]
    if interval is not None:
        low, high = (scale(end) for end in interval)
        middle, arm = y + thickness / 2, thickness * 0.28
        parts += [line(low, middle, high, middle, class_="whisker")]
        parts += [line(end, middle - arm, end, middle + arm, class_="whisker") for end in (low, high)]
    return group(*parts)


def histogram(
    frame: Frame, edges: Sequence[float], heights: Sequence[float], *, class_: str, about: Sequence[str] = ()
) -> Markup:
    """Upright bars between edges; a bar of height 0 is not drawn."""
    parts = []
    for i, height in enumerate(heights):
        if height > 0:
            left, right = frame.x(edges[i]), frame.x(edges[i + 1])
            top = frame.y(height)
            parts.append(rect(left, top, right - left, frame.y.start - top, class_=class_, about=about[i] if about else ""))
    return group(*parts)


# --------------------------------------------------------------------------------------------------------- colours

_RAMP = (
    (0, 32, 76), (0, 63, 110), (69, 87, 109), (108, 110, 115), (145, 135, 119), (188, 163, 104), (229, 193, 79), (255, 234, 70),
)  # fmt: skip
"""From dark blue to yellow: it grows lighter all the way, and looks the same to colour-blind eyes."""


def ramp(share: float) -> str:
    """The colour of a share from 0 to 1, dark to light."""
    position = min(1.0, max(0.0, share)) * (len(_RAMP) - 1)
    i = min(int(position), len(_RAMP) - 2)
    mixed = (round(a + (position - i) * (b - a)) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


# ---------------------------------------------------------------------------------------------------------- digits


def plain(value: float) -> str:
    """A number on an axis, without needless digits."""
    return f"{value:.6g}".replace("-", "−")


def _text(value: str | float) -> str:
    """An attribute's value; lengths with two digits after the point at most."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
