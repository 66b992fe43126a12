"""Figures as words: how many digits, which unit, and what stands where nothing was measured.

Nothing measured is not zero: it reads `unscored` or `not measured`.
"""

from __future__ import annotations

from collections.abc import Sequence

from steerguard.metrics import Interval
from steerguard.sweeping.result import Point

UNSCORED = "unscored"
NOT_MEASURED = "not measured"


def number(value: float | None, digits: int = 1, *, missing: str = UNSCORED) -> str:
    """A number with so many digits after the point."""
    return missing if value is None else minus(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 1, *, missing: str = UNSCORED) -> str:
    """A difference, with its sign if it has one."""
    return missing if value is None else minus(f"{value:+.{digits}f}")


def compact(value: float | None, *, missing: str = NOT_MEASURED) -> str:
    """A number of unknown size, with three significant digits."""
    return missing if value is None else minus(f"{value:.3g}")


def percent(share: float | None, digits: int = 0, *, missing: str = NOT_MEASURED) -> str:
    """A share from 0 to 1 as percent."""
    return missing if share is None else minus(f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%")


def span(interval: Interval | None, digits: int = 1) -> str:
    """The ends of an interval, `[61.0, 84.2]`; empty where there are none."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def ends(interval: Interval) -> str:
    """As `span`, for a figure of unknown size."""
    return "" if interval.low is None or interval.high is None else f"[{compact(interval.low)}, {compact(interval.high)}]"


def counted(interval: Interval | None) -> str:
    """How many values are in a mean, and how many are not: `n 38, 2 unscored`."""
    if interval is None:
        return ""
    return f"n\N{NO-BREAK SPACE}{interval.n}" + (f", {interval.unscored} unscored" if interval.unscored else "")


def measured(interval: Interval | None, digits: int = 1, *, missing: str = UNSCORED) -> str:
    """Mean, interval and n on one line."""
    if interval is None:
        return missing
    return " ".join(part for part in (number(interval.mean, digits), span(interval, digits), f"({counted(interval)})") if part)


def strength(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def setting(point: Point) -> str:
    """`StTP(12) at layer 26, all positions`."""
    return f"{rule(point)} at {layers(point.layers)}, {point.positions} positions"


def short(point: Point) -> str:
    """`StTP(12), layer 26, all`."""
    return f"{rule(point)}, {layers(point.layers)}, {point.positions}"


def rule(point: Point) -> str:
    return point.rule if point.strength is None else f"{point.rule}({strength(point.strength)})"


def layers(chosen: Sequence[int]) -> str:
    return f"layer{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"


def about(point: Point, asked: int) -> str:
    """Everything of a point, for who lets the pointer rest on it."""
    figures = point.figures
    error = f" ± {figures.error:.1f}" if figures.trait is not None and figures.error else ""
    parts = [setting(point), f"trait {number(figures.trait)}{error}", f"coherence {number(figures.coherence)}"]
    parts.append(f"moved {percent(figures.moved)} of the tokens")
    if point.benign is not None and point.benign.kl is not None:
        parts.append(f"benign KL {compact(point.benign.kl)}")
    if point.scenarios < asked:
        parts.append(f"answered {point.scenarios} of {asked} scenarios")
    if figures.unscored:
        parts.append(f"{figures.unscored} of {figures.n} answers unscored")
    if not point.eligible:
        parts.append(f"not eligible: {point.why or 'no reason given'}")
    return "\n".join(parts)


def minus(text: str) -> str:
    """A minus sign as wide as a plus; and no sign before nothing."""
    return text.replace("-", "−") if any(c in "123456789" for c in text) else text.lstrip("+-")
