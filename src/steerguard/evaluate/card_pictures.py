"""The pictures of a card: the gap, each figure beside its limit, turns, and controls. Drawn by `report.svg`.

It knows figures by name where a picture needs several of them, and draws nothing where one of them is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from steerguard.evaluate import wording
from steerguard.evaluate.card import LIGHTS, Card
from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Row
from steerguard.metrics import Interval
from steerguard.report import bars, svg
from steerguard.report.curves import NARROW, WIDE
from steerguard.report.svg import Frame, Scale
from steerguard.report.wording import counted

FOREST, ROW = 150, 22
ARMS = {"unguarded": ("malicious", "square"), "guarded": ("k0", "circle"), "released": ("k1", "triangle")}
"""Arms of a conversation: colour and mark."""
CONTROLS = "controls.arm."


def gap(card: Card) -> Markup:
    """Malicious, guarded and aligned on one line."""
    score, aligned = card.row("trait.score"), card.row("trait.aligned")
    if score is None or aligned is None or not isinstance(score.value, Paired) or not isinstance(aligned.value, Interval):
        return Markup("")
    arms = [("malicious", score.value.unguarded), ("aligned", aligned.value), ("guarded", score.value.guarded)]
    return _both(lambda width: bars.gap(arms, "k0", width))


def forest(row: Row) -> Markup:
    """A figure's interval on a line with its limit."""
    found, limit = row.held, row.figure.limit
    if found is None or limit is None:
        return Markup("")
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    ends = (low, high, limit.bound)
    pad = 0.08 * (max(ends) - min(ends)) or 1.0
    x, y = Scale(min(ends) - pad, max(ends) + pad, 4, FOREST - 4), ROW / 2
    over_from, over_to = (x(limit.bound), x.end) if limit.sense == "at most" else (x.start, x(limit.bound))
    kind = LIGHTS[row.verdict]
    parts = [
        svg.rect(over_from, 2, over_to - over_from, ROW - 4, class_="shut"),
        svg.line(x(limit.bound), 2, x(limit.bound), ROW - 2, class_="level bar"),
        svg.line(x(low), y, x(high), y, class_=f"held {kind}"),
        svg.mark("circle", x(found.mean), y, size=3.6, class_=f"held {kind}", about=wording.shown(found)),
    ]
    label = f"{wording.shown(found)}; limit {limit}"
    return svg.picture(FOREST, ROW, label, *parts, class_="forest")


def pictures(card: Card) -> list[tuple[str, Markup]]:
    """(caption, picture) of what several figures say together."""
    found: list[tuple[str, Markup]] = []
    details = {row.figure.name: row for section in card.sections for row in section.details}
    for metric, caption, top in (("trait", "Trait, turn by turn", 100.0), ("within", "Repeated 4-grams within a turn, %", None)):
        drawn = _turns(details, metric, top)
        if drawn:
            found.append((caption, drawn))
    controls = _controls(details)
    if controls:
        found.append(("Trait at one displacement, by direction and rule; hollow: not matched", controls))
    return found


def _turns(details: Mapping[str, Row], metric: str, top: float | None) -> Markup:
    """One curve for each arm."""
    curves: dict[str, list[tuple[int, Interval]]] = {}
    for arm in ARMS:
        start = f"turns.{metric}.{arm}."
        own = [(int(name.removeprefix(start)), row.held) for name, row in details.items() if name.startswith(start)]
        curves[arm] = sorted((turn, held) for turn, held in own if held is not None)
    turns = [turn for own in curves.values() for turn, _ in own]
    if not turns:
        return Markup("")
    most = top or max(5.0, *(held.mean for own in curves.values() for _, held in own))
    return _both(lambda width: _curves(curves, max(turns), most, width, metric))


def _curves(curves: Mapping[str, Sequence[tuple[int, Interval]]], turns: int, top: float, width: int, metric: str) -> Markup:
    frame = Frame(Scale(1, max(2, turns), 40, width - 12), Scale(0, top, 190, 34))
    every = [float(turn) for turn in range(1, turns + 1)]
    parts = [svg.axis_left(frame, frame.y.ticks(4)), svg.axis_bottom(frame, every, label="turn")]
    for i, (arm, own) in enumerate((arm, own) for arm, own in curves.items() if own):
        colour, shape = ARMS[arm]
        parts.append(svg.polyline([frame.at(turn, held.mean) for turn, held in own], class_=f"curve {colour}"))
        for turn, held in own:
            about = f"{arm}, turn {turn}: {wording.shown(held)}, {counted(held)}"
            parts.append(svg.mark(shape, *frame.at(turn, held.mean), size=3.8, class_=f"dot {colour}", about=about))
        parts += [svg.mark(shape, 46 + 92 * i, 10, size=4, class_=f"dot {colour}"), svg.text(56 + 92 * i, 14, arm, class_="axis")]
    return svg.picture(width, 230, f"{metric} by turn", *parts)


def _controls(details: Mapping[str, Row]) -> Markup:
    """Every arm's trait with its interval, one below the other."""
    rows = [
        (name.removeprefix(CONTROLS).removesuffix(".trait"), row.held, row.note)
        for name, row in details.items()
        if name.startswith(CONTROLS) and name.endswith(".trait") and row.held is not None
    ]
    return _both(lambda width: _forest_of(rows, width)) if rows else Markup("")


def _forest_of(rows: Sequence[tuple[str, Interval | None, str]], width: int) -> Markup:
    x = Scale(0, 100, 130, width - 16)
    frame = Frame(x, Scale(0, 1, 14 + 22 * len(rows), 8))
    parts = [frame.upright(tick, class_="grid") for tick in (0, 25, 50, 75, 100)]
    parts.append(svg.axis_bottom(frame, [0, 25, 50, 75, 100], label="trait, 0 to 100"))
    for i, (name, held, note) in enumerate(rows):
        if held is None:
            continue
        y = 20 + 22 * i
        colour = "aligned" if name == "aligned" else "malicious" if name == "unguarded" else "k0" if name == "guard" else "k1"
        parts.append(svg.text(x.start - 10, y + 4, name, anchor="end", class_="strong" if name == "guard" else "axis"))
        if held.low is not None and held.high is not None:
            parts.append(svg.line(x(held.low), y, x(held.high), y, class_=f"curve {colour}"))
        hollow = " hollow" if note else ""
        about = f"{name}: {wording.shown(held)}, {counted(held)}{f'; {note}' if note else ''}"
        parts.append(svg.mark("circle", x(held.mean), y, size=4.4, class_=f"dot {colour}{hollow}", about=about))
    return svg.picture(width, 60 + 22 * len(rows), "Trait of every control", *parts)


def _both(draw: Callable[[int], Markup]) -> Markup:
    """A picture for wide pages and one for phones; the style sheet shows the one that fits."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))
