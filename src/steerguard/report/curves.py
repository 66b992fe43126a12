"""The pictures of the grid: trait against layer, trait against coherence, and the map of layers and strengths.

What this module knows: which of a result's figures stand where. How a line is drawn is `svg`'s affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from steerguard.report import svg, wording
from steerguard.report.svg import Frame, Scale
from steerguard.sweeping.result import Point, SweepResult

WIDE, NARROW = 860, 358
"""Widths of the two drawings of a picture: a page's, and a phone's."""
GUTTER = 66
"""Room at the right of the curves for the names of the lines across."""
MAP_WIDTH = 400
"""Width of one map; two stand side by side on a wide page."""


@dataclass(frozen=True)
class Look:
    """How a rule is told apart: by colour and by shape."""

    index: int

    @property
    def colour(self) -> str:
        "class in the style sheet"
        return f"k{self.index % 6}"

    @property
    def shape(self) -> str:
        return svg.SHAPES[self.index % len(svg.SHAPES)]

    @property
    def key(self) -> Markup:
        """The mark by itself, for a legend."""
        drawn = svg.mark(self.shape, 8, 8, size=4.5, class_=f"dot {self.colour}")
        return svg.element("svg", drawn, viewBox="0 0 16 16", class_="key", aria_hidden="true")


def looks(result: SweepResult) -> dict[str, Look]:
    """Every rule's look, in the order in which they were asked for."""
    names = dict.fromkeys([*result.settings.rules, *(point.rule for point in result.select.points)])
    return {name: Look(i) for i, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------ trait against layer


def best_by_layer(points: Iterable[Point]) -> list[Point]:
    """Of each layer its best point, in the order of the layers: the highest trait of the eligible, else of all.

    Points on several layers and points without a score are left out.
    """
    best: dict[int, Point] = {}
    for point in points:
        if len(point.layers) == 1 and point.figures.trait is not None:
            held = best.get(point.layers[0])
            if held is None or _rank(point) > _rank(held):
                best[point.layers[0]] = point
    return [best[layer] for layer in sorted(best)]


def _rank(point: Point) -> tuple[bool, float]:
    return point.eligible, -math.inf if point.figures.trait is None else point.figures.trait


def layer_curves(result: SweepResult, positions: str, width: int) -> Markup:
    """Trait above coherence on one axis of layers, a line per rule, the baselines across."""
    layers = sorted({layer for point in result.select.points for layer in point.layers})
    left, right, inset = 40.0, width - GUTTER, 10.0
    x = Scale(layers[0], layers[-1], left + inset, right - inset)
    trait = Frame(Scale(0, 1, left, right), Scale(0, 100, 268, 28))
    kinds = looks(result)
    best = {name: best_by_layer(p for p in result.select.points if p.rule == name and p.positions == positions) for name in kinds}
    drawn = [point.figures.coherence for points in best.values() for point in points]
    low = _floor([value for value in (*drawn, result.coherence_bar) if value is not None])
    coherence = Frame(Scale(0, 1, left, right), Scale(low, 100, 416, 312))
    ticks = [tick for tick in x.ticks(width // 60) if tick == int(tick)]
    parts = [
        svg.axis_left(trait, [0, 25, 50, 75, 100], label="trait, 0 to 100"),
        svg.axis_left(coherence, coherence.y.ticks(4), label=f"coherence, {svg.plain(low)} to 100"),
        svg.axis_bottom(Frame(x, coherence.y), ticks, label="layer"),
        _levels(trait, [("aligned", result.select.aligned.trait), ("malicious", result.select.malicious.trait)]),
        _levels(coherence, [("aligned", result.select.aligned.coherence), ("bar", result.coherence_bar)]),
    ]
    chosen = {choice.point for choice in result.select.chosen.values()}
    ringed = [result.select.points[i] for i in sorted(chosen)]
    apart = min(5.0, 0.12 * (x.end - x.start) / max(1, len(layers) - 1))  # so that marks at one height do not hide each other
    for name, look in kinds.items():
        aside = apart * (look.index - (len(kinds) - 1) / 2)
        own_x = replace(x, start=x.start + aside, end=x.end + aside)
        parts.append(_curve(best[name], own_x, trait.y, look, "trait", result.select.n))
        parts.append(_curve(best[name], own_x, coherence.y, look, "coherence", result.select.n))
        for point in ringed:
            if point.rule == name and point.positions == positions and len(point.layers) == 1:
                parts.append(_chosen(point, own_x, trait.y, look, result.select.n))
    label = f"Trait and coherence by layer, {positions} positions: each rule's best strength at each layer"
    return svg.picture(width, 456, label, *parts)


def _curve(points: Sequence[Point], x: Scale, y: Scale, look: Look, which: str, asked: int) -> Markup:
    """One rule's line, broken where a layer has no score, and a mark for each layer."""
    spots = [(point, getattr(point.figures, which)) for point in points]
    known = [(point, x(point.layers[0]), y(value)) for point, value in spots if value is not None]
    parts = [svg.polyline([(px, py) for _, px, py in known], class_=f"curve {look.colour}")]
    size = 3.6 if len(points) < 50 else 2.6
    parts += [
        svg.mark(look.shape, px, py, size=size, class_=_dot(point, look), about=wording.about(point, asked))
        for point, px, py in known
    ]
    return svg.group(*parts)


def _chosen(point: Point, x: Scale, y: Scale, look: Look, asked: int) -> Markup:
    """The mark of a chosen point with its ring; drawn again, since its layer's best may be another strength."""
    if point.figures.trait is None:
        return Markup("")
    px, py = x(point.layers[0]), y(point.figures.trait)
    return svg.group(
        svg.mark(look.shape, px, py, size=4.2, class_=_dot(point, look), about=wording.about(point, asked)),
        svg.ring(px, py, class_=f"ring {look.colour}"),
    )


def _dot(point: Point, look: Look) -> str:
    return f"dot {look.colour}" + ("" if point.eligible else " hollow")


def _levels(frame: Frame, levels: Sequence[tuple[str, float | None]]) -> Markup:
    """Values as lines across, each named to the right of its end, names kept apart."""
    known = sorted(((frame.y(value), name, value) for name, value in levels if value is not None), reverse=True)
    parts, last = [], math.inf
    for y, name, value in known:  # from the lowest line up
        at = min(y, last - 30)
        last = at
        parts.append(frame.across(value, class_=f"level {name}"))
        parts.append(svg.text(frame.x.end + 6, at - 1, name, class_="level-name"))
        parts.append(svg.text(frame.x.end + 6, at + 12, wording.number(value), class_="level-name"))
    return svg.group(*parts)


# -------------------------------------------------------------------------------------------- trait against coherence


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other betters in both trait and coherence, from the lowest coherence up."""
    known = [
        (point.figures.coherence, point.figures.trait, i)
        for i, point in enumerate(points)
        if point.figures.coherence is not None and point.figures.trait is not None
    ]
    out: list[int] = []
    top = -math.inf
    for _, trait, i in sorted(known, key=lambda one: (-one[0], -one[1])):
        if trait > top:
            top = trait
            out.append(i)
    return out[::-1]


def pareto_frame(result: SweepResult, width: int) -> Frame:
    """Where a coherence and a trait stand in `pareto`."""
    figures = [result.select.aligned, result.select.malicious, *(point.figures for point in result.select.points)]
    low = _floor([f.coherence for f in figures if f.coherence is not None])
    return Frame(Scale(low, 100, 46, width - 18), Scale(0, 100, 372, 28))


def _floor(coherences: Sequence[float]) -> float:
    """Where an axis of coherence begins: a round number below all of them, 80 at the highest."""
    return max(0.0, min(10.0 * math.floor((min(coherences, default=0.0) - 2) / 10), 80.0))


def pareto(result: SweepResult, width: int) -> Markup:
    """Every setting by coherence and trait; the front, the bar, the baselines, and what was chosen."""
    frame, points = pareto_frame(result, width), result.select.points
    kinds = looks(result)
    faint: list[Markup] = []
    plain: list[Markup] = []
    clear = {*front(points), *(choice.point for choice in result.select.chosen.values())}
    for i, point in enumerate(points):
        trait, coherence = point.figures.trait, point.figures.coherence
        if trait is not None and coherence is not None:
            look = kinds[point.rule]
            class_ = _dot(point, look) + ("" if i in clear else " faint")
            px, py = frame.at(coherence, trait)
            size = 4.4 if len(points) < 400 else 3.0
            mark = svg.mark(look.shape, px, py, size=size, class_=class_, about=wording.about(point, result.select.n))
            (plain if i in clear else faint).append(mark)
    steps = [frame.at(points[i].figures.coherence or 0.0, points[i].figures.trait or 0.0) for i in front(points)]
    parts = [
        svg.axis_left(frame, [0, 25, 50, 75, 100], label="trait, 0 to 100"),
        svg.axis_bottom(frame, frame.x.ticks(5 if width < 500 else 10), label=f"coherence, {svg.plain(frame.x.low)} to 100"),
        _bar(frame, result.coherence_bar),
        *faint,
        svg.polyline(_stairs(steps), class_="front"),
        *plain,
        _baselines(frame, result),
    ]
    for rule, choice in result.select.chosen.items():
        figures = points[choice.point].figures
        if figures.trait is not None and figures.coherence is not None:
            px, py = frame.at(figures.coherence, figures.trait)
            parts.append(svg.ring(px, py, class_=f"ring {kinds[rule].colour}"))
            if rule == result.select.best:
                parts.append(svg.ring(px, py, size=13, class_=f"ring {kinds[rule].colour}"))
    return svg.picture(width, 414, "Trait against coherence of every setting, with the bar, the front and the choice", *parts)


def _bar(frame: Frame, bar: float | None) -> Markup:
    """The lowest coherence that is eligible; what lies below it is shaded."""
    if bar is None or not frame.x.low <= bar <= frame.x.high:
        return Markup("")
    px = frame.x(bar)
    crowded = px - frame.x.start < 80
    at, anchor = (px + 5, "start") if crowded else (px - 5, "end")
    return svg.group(
        svg.rect(frame.x.start, frame.y.end, px - frame.x.start, frame.y.start - frame.y.end, class_="shut"),
        frame.upright(bar, class_="level bar"),
        svg.text(at, frame.y.start - 8, f"bar {wording.number(bar)}", anchor=anchor, class_="level-name"),
    )


def _stairs(points: Sequence[svg.Point]) -> list[svg.Point]:
    """The front as steps: what is reached at a coherence is reached below it too."""
    out: list[svg.Point] = []
    for i, (x, y) in enumerate(points):
        if i:
            out.append((points[i - 1][0], y))
        out.append((x, y))
    return out


def _baselines(frame: Frame, result: SweepResult) -> Markup:
    parts = []
    for name, figures in (("aligned", result.select.aligned), ("malicious", result.select.malicious)):
        if figures.trait is not None and figures.coherence is not None:
            px, py = frame.at(figures.coherence, figures.trait)
            about = f"{name}: trait {wording.number(figures.trait)}, coherence {wording.number(figures.coherence)}, n {figures.n}"
            parts.append(svg.mark("cross", px, py, size=6, class_="baseline", about=about))
            parts.append(svg.text(px - 10, py + (16 if py < frame.y.end + 20 else -8), name, anchor="end", class_="level-name"))
    return svg.group(*parts)


# ------------------------------------------------------------------------------------------------ layers and strengths


def heat_map(result: SweepResult, name: str, positions: str) -> Markup:
    """One rule's trait by layer and strength: dark to light, hatched where not eligible, empty where not looked."""
    own = [p for p in result.select.points if p.rule == name and p.positions == positions and len(p.layers) == 1]
    layers = sorted({layer for p in result.select.points for layer in p.layers if len(p.layers) == 1})
    strengths: list[float | None] = [*sorted({p.strength for p in own if p.strength is not None})]
    strengths += [None] if any(p.strength is None for p in own) else []
    left, right, top, row = 40.0, MAP_WIDTH - 6.0, 8.0, 24.0
    width = (right - left) / max(1, len(layers))
    bottom = top + row * len(strengths)
    column = {layer: left + width * i for i, layer in enumerate(layers)}
    height = {strength: bottom - row * (i + 1) for i, strength in enumerate(strengths)}
    chosen = result.select.chosen.get(name)
    cells, shut, values, marked = [], [], [], []
    gap = 1.0 if width > 8 else 0.0
    for point in own:
        box = (column[point.layers[0]], height[point.strength], width - gap, row - 1)
        cells.append(_cell(point, box, result.select.n))
        values.append(_value(point, box))
        if not point.eligible and point.figures.trait is not None:
            shut.append(box)
        if chosen is not None and result.select.points[chosen.point] is point:
            x, y, w, h = box
            marked += [svg.rect(x - 1, y - 1, w + 2, h + 2, class_=kind) for kind in ("chosen-halo", "chosen")]
    ground = svg.rect(left, top, right - left, bottom - top, class_="ground")
    parts = [ground, *cells, svg.hatch(shut), *values, *marked]
    parts += [svg.text(left - 6, y + row / 2 + 4, wording.strength(s), anchor="end", class_="tick") for s, y in height.items()]
    every = max(1, math.ceil(26 / width))
    parts += [
        svg.text(column[layer] + width / 2, bottom + 16, str(layer), anchor="middle", class_="tick") for layer in layers[::every]
    ]
    parts.append(svg.text((left + right) / 2, bottom + 33, "layer", anchor="middle", class_="axis"))
    return svg.picture(MAP_WIDTH, bottom + 40, f"Trait of {name} by layer and strength, {positions} positions", *parts)


def _cell(point: Point, box: tuple[float, float, float, float], asked: int) -> Markup:
    """One setting: coloured by its trait, or empty if that is unscored."""
    trait, about = point.figures.trait, wording.about(point, asked)
    if trait is None:
        return svg.rect(*box, class_="unscored", about=about)
    return svg.rect(*box, fill=svg.ramp(trait / 100), about=about)


def _value(point: Point, box: tuple[float, float, float, float]) -> Markup:
    """What stands in a cell: its trait where there is room, a question mark where it is unscored."""
    x, y, width, height = box
    trait = point.figures.trait
    if trait is None:
        return svg.text(x + width / 2, y + height / 2 + 4, "?", anchor="middle", class_="tick")
    if width < 24:
        return Markup("")
    return svg.element(
        "text", f"{trait:.0f}", x=x + width / 2, y=y + height / 2 + 4, text_anchor="middle", stroke=svg.ramp(trait / 100),
        class_=f"value {'on-dark' if trait < 58 else 'on-light'}",
    )  # fmt: skip
