"""The pictures of the study, each a file of its own that is legible on white and on black.

It knows the figures that `study` writes, and draws what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from steerguard.report import svg
from steerguard.report.svg import Frame, Scale

WIDTH, ROW, LEFT = 720, 24, 210
STYLE = """
svg { --ink: #1c2126; --soft: #59636e; --line: #d5d0c7; --k0: #0072b2; --k1: #d55e00; --k2: #8b949e; background: transparent; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e7e9eb; --soft: #a0abb5; --line: #3a4148; --k0: #56b4e9; --k1: #f0894a; --k2: #8b96a0; }
}
text { font: 13px system-ui, sans-serif; fill: var(--ink); } .tick, .axis { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .base { stroke: var(--soft); } .whisker { stroke-width: 2.4; fill: none; }
.k0 { stroke: var(--k0); fill: var(--k0); }
.k1 { stroke: var(--k1); fill: var(--k1); }
.k2 { stroke: var(--k2); fill: var(--k2); }
.strong { font-weight: 650; }
"""
Bar = tuple[str, Mapping[str, Any] | None, str]
"a label, an interval as JSON, and a colour"


def pictures(figures: Mapping[str, Any]) -> dict[str, Markup]:
    """name -> picture."""
    out = {}
    for trait, found in figures["traits"].items():
        out[f"{trait}-positions"] = _positions(trait, found["positions"])
        out[f"{trait}-neighbours"] = _neighbours(trait, found["neighbours"])
    for key, card in figures["cards"].items():
        controls = _controls(card["details"])
        if controls:
            name = key.replace(" ", "-")
            out[f"{name}-controls"] = _forest(f"{key}: trait at one displacement, 0 to 100", controls)
    return out


def _positions(trait: str, found: Mapping[str, Any]) -> Markup:
    """Share of the gap that each rule brings back on all positions and on the answer alone."""
    rows: list[Bar] = [
        (name, one["recovered"], "k0" if name.endswith(" all") else "k1") for name, one in found.items() if "recovered" in one
    ]
    return _forest(f"{trait}: share of the gap brought back, %, by positions", rows)


def _neighbours(trait: str, found: Mapping[str, Any]) -> Markup:
    """What is left one step away; grey where coherence is not kept."""
    rows: list[Bar] = []
    for name, own in found.items():
        for key, one in own.items():
            label = f"{name}, as chosen" if key == "itself" else key
            rows.append((label, one["recovered"], "k2" if not one["coherent"] else "k0" if key == "itself" else "k1"))
    return _forest(f"{trait}: share of the gap brought back, %, one step away (grey: below 90 % of coherence)", rows)


def _controls(details: Mapping[str, Any]) -> list[Bar]:
    start, end = "controls.arm.", ".trait"
    rows: list[Bar] = []
    for name, value in details.items():
        if name.startswith(start) and name.endswith(end):
            label = name.removeprefix(start).removesuffix(end)
            rows.append((label, value, "k2" if label in ("unguarded", "aligned") else "k0" if label == "guard" else "k1"))
    return rows


def _forest(title: str, rows: Sequence[Bar]) -> Markup:
    """Intervals one below the other, on one scale that holds 0 to 100."""
    known = [end for _, one, _ in rows if one for end in (one["mean"], one["low"], one["high"]) if end is not None]
    low, high = min([0.0, *known]), max([100.0, *known])
    height = 70 + ROW * len(rows)
    x = Scale(low, high, LEFT, WIDTH - 20)
    frame = Frame(x, Scale(0, 1, height - 42, 34))
    parts = [svg.element("style", Markup(STYLE)), svg.text(8, 18, title, class_="strong")]
    parts += [frame.upright(tick, class_="grid") for tick in x.ticks(6)] + [svg.axis_bottom(frame, x.ticks(6))]
    for i, (label, one, colour) in enumerate(rows):
        y = 46 + ROW * i
        parts.append(svg.text(LEFT - 10, y + 4, label, anchor="end"))
        if one is None:
            parts.append(svg.text(LEFT + 6, y + 4, "unscored", class_="tick"))
            continue
        if one["low"] is not None and one["high"] is not None:
            parts.append(svg.line(x(one["low"]), y, x(one["high"]), y, class_=f"whisker {colour}"))
        about = f"{label}: {one['mean']:.1f}, n {one['n']}"
        parts.append(svg.mark("circle", x(one["mean"]), y, size=4.5, class_=colour, about=about))
    drawn = svg.picture(WIDTH, height, title, *parts)
    return Markup(str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
