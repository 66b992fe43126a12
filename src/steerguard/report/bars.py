"""The pictures of the test: the headline's line, projections, categories, and each scenario's change.

What this module knows: which of a result's figures stand where. How a bar is drawn is `svg`'s affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from steerguard.metrics import Interval
from steerguard.report import svg, wording
from steerguard.report.curves import Look
from steerguard.report.svg import Frame, Scale
from steerguard.sweeping.result import BASELINES, Projections, TestedArm

PANEL = 286
"""Width of a small panel; three stand side by side on a wide page."""


def look_of(arm: str, looks: Mapping[str, Look]) -> str:
    """The class of an arm's colour: a rule's own, and the baselines' without a hue."""
    return looks[arm].colour if arm in looks else arm


# ------------------------------------------------------------------------------------------------------ the headline


def gap(arms: Sequence[tuple[str, Interval | None]], colour: str, width: int) -> Markup:
    """Malicious, aligned and, last, guarded on one line from 0 to 100, the guarded with its interval."""
    x = Scale(0, 100, 14, width - 14)
    y = 46.0
    means = {name: None if interval is None else interval.mean for name, interval in arms}
    parts = [svg.line(x.start, y, x.end, y, class_="base")]
    parts += [svg.text(x(tick), y + 44, svg.plain(tick), anchor="middle", class_="tick") for tick in (0, 25, 50, 75, 100)]
    parts += [svg.line(x(tick), y + 26, x(tick), y + 31, class_="base") for tick in (0, 25, 50, 75, 100)]
    malicious, aligned = means.get("malicious"), means.get("aligned")
    if malicious is not None and aligned is not None:
        parts.append(svg.line(x(malicious), y, x(aligned), y, class_="gap"))
    for _, interval in arms[-1:]:
        if interval is not None and interval.low is not None and interval.high is not None:
            parts.append(svg.line(x(interval.low), y, x(interval.high), y, class_=f"spread {colour}"))
    for name, interval in arms:
        if interval is None:
            continue
        px, guarded = x(interval.mean), name not in BASELINES
        about = f"{name}: {wording.measured(interval)}"
        shape, size, class_ = ("circle", 8.0, f"dot {colour}") if guarded else ("square", 5.0, f"dot {name}")
        parts.append(svg.mark(shape, px, y, size=size, class_=class_, about=about))
        anchor = "start" if px < width * 0.25 else "end" if px > width * 0.75 else "middle"
        at = px - 8 if anchor == "start" else px + 8 if anchor == "end" else px
        label = f"{'guarded' if guarded else name} {wording.number(interval.mean)}"
        height, class_ = (y - 18, "strong") if guarded else (y + 21, "level-name")
        parts.append(svg.text(at, height, label, anchor=anchor, class_=class_))
    return svg.picture(width, 96, "Trait of the malicious, the guarded and the aligned model, 0 to 100", *parts)


# ------------------------------------------------------------------------------------------------------- projections


def projections(found: Projections, colour: str, ends: tuple[float, float], name: str) -> Markup:
    """How many tokens stood where; what the gate moved is filled, m is drawn."""
    total = sum(found.seen)
    shares = [100 * n / total if total else 0.0 for n in found.seen]
    moved = [100 * n / total if total else 0.0 for n in found.moved]
    top = max([1.0, *shares])
    frame = Frame(Scale(*ends, 34, PANEL - 8), Scale(0, top * 1.05, 168, 40))
    about = [
        f"ρ from {wording.compact(a)} to {wording.compact(b)}\n{seen} tokens, {shifted} moved"
        for a, b, seen, shifted in zip(found.edges, found.edges[1:], found.seen, found.moved, strict=False)
    ]
    parts = [
        svg.axis_left(frame, frame.y.ticks(3)),
        svg.text(frame.x.start, 12, "% of tokens", class_="axis"),
        svg.histogram(frame, found.edges, shares, class_=f"seen {colour}", about=about),
        svg.histogram(frame, found.edges, moved, class_=f"moved {colour}", about=about),
        svg.axis_bottom(frame, frame.x.ticks(4), label="projection ρ"),
    ]
    for label, value, class_ in (("μ−", found.mu_neg, "mean"), ("μ+", found.mu_pos, "mean"), ("m", found.m, "boundary")):
        if ends[0] <= value <= ends[1]:
            parts.append(frame.upright(value, class_=class_))
            y = 24 if label == "m" else 36
            parts.append(svg.text(frame.x(value), y, label, anchor="middle", class_="strong" if label == "m" else "tick"))
    about_all = f"Histogram of the projections of {total} tokens of the arm {name}, {sum(found.moved)} of them moved"
    return svg.picture(PANEL, 208, about_all, *parts)


def shared_ends(every: Sequence[Projections]) -> dict[int, tuple[float, float]]:
    """The ends of the axis for each layer, so that arms at one layer can be compared."""
    out: dict[int, tuple[float, float]] = {}
    for found in every:
        values = [found.edges[0], found.edges[-1], found.m, found.mu_pos, found.mu_neg]
        low, high = out.get(found.layer, (min(values), max(values)))
        out[found.layer] = (min(low, *values), max(high, *values))
    return out


# -------------------------------------------------------------------------------------------------------- categories


def category(name: str, arms: Sequence[TestedArm], looks: Mapping[str, Look]) -> Markup:
    """One category: a bar for each arm, with its interval and its n."""
    scale, row = Scale(0, 100, 72, PANEL - 74), 22.0
    bottom = 8 + row * len(arms)
    frame = Frame(scale, Scale(0, 1, bottom, 4))
    parts = [frame.upright(tick, class_="grid") for tick in (0, 50, 100)]
    for i, arm in enumerate(arms):
        y, label = 8 + row * i, arm.name if len(arm.name) < 11 else f"{arm.name[:9]}…"
        parts.append(svg.text(scale.start - 8, y + 13, label, anchor="end", class_="tick"))
        found = [part.trait for part in arm.categories if part.category == name]
        trait = found[0] if found else None
        if trait is None:
            missing = wording.UNSCORED if found else wording.NOT_MEASURED
            parts.append(svg.text(scale.start + 6, y + 13, missing, class_="tick missing"))
            continue
        ends = None if trait.low is None or trait.high is None else (trait.low, trait.high)
        about = f"{arm.name}, {name}: {wording.measured(trait)}"
        parts.append(svg.bar(scale, y + 3, row - 9, trait.mean, ends, class_=look_of(arm.name, looks), about=about))
        parts.append(svg.text(PANEL - 66, y + 13, wording.number(trait.mean, 0), class_="strong"))
        parts.append(svg.text(PANEL - 2, y + 13, f"n {trait.n}", anchor="end", class_="tick"))
    parts += [svg.text(scale(tick), bottom + 14, svg.plain(tick), anchor="middle", class_="tick") for tick in (0, 50, 100)]
    return svg.picture(PANEL, bottom + 20, f"Trait of the category {name} by arm", *parts)


# ----------------------------------------------------------------------------------------------- change by scenario


def changes(found: Sequence[tuple[str, float]], colour: str, width: int) -> Markup:
    """Every scenario's change of trait, from the worst to the best; what went the wrong way stands below the line."""
    ordered = sorted(found, key=lambda one: one[1])
    frame = Frame(Scale(0, max(1, len(ordered)), 44, width - 8), Scale(-100, 100, 176, 26))
    parts = [svg.axis_left(frame, [-100, -50, 0, 50, 100], label="guarded − malicious, points of trait")]
    step = (frame.x.end - frame.x.start) / max(1, len(ordered))
    for i, (name, change) in enumerate(ordered):
        high, low = frame.y(max(change, 0)), frame.y(min(change, 0))
        side = "wrong" if change < 0 else colour
        parts.append(
            svg.rect(frame.x(i), high - 0.75, max(0.8, step - (1 if step > 3 else 0)), low - high + 1.5,
                     class_=f"change {side}", about=f"{name}: {wording.signed(change)}")
        )  # fmt: skip
    parts.append(frame.across(0, class_="base"))
    return svg.picture(width, 186, f"Change of trait of {len(ordered)} scenarios, sorted from worst to best", *parts)
