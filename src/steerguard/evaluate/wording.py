"""Figures of a card as words: how many digits, the interval, n."""

from __future__ import annotations

import math
from collections.abc import Mapping

from steerguard.evaluate.results import Paired
from steerguard.evaluate.section import Limit, Part, Row, Verdict
from steerguard.metrics import Interval
from steerguard.report.wording import NOT_MEASURED, minus

VERDICTS: Mapping[Verdict, str] = {
    "over": "limit exceeded", "undecided": "not decided", "within": "kept", "free": "", "missing": NOT_MEASURED,
}  # fmt: skip
PARTS: Mapping[Part, str] = {"buys": "What it buys", "costs": "What it costs", "fails": "Where it fails or might"}
"""The parts of a card, in order."""


def number(value: float | None, *, signed: bool = False) -> str:
    """A number with two or three digits that mean something: 93.5, 0.042, 1,240."""
    if value is None:
        return NOT_MEASURED
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 9.995 or size == 0 else min(4, 2 - math.floor(math.log10(size)))
    digits = min(digits, 2) if size >= 1 else digits
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return minus(text)


def span(found: Interval | None) -> str:
    """`[61.0, 84.2]`; empty where there is none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{number(found.low)}, {number(found.high)}]"


def shown(found: Interval | None, *, signed: bool = False) -> str:
    """Mean and interval."""
    if found is None:
        return NOT_MEASURED
    ends = span(found)
    return f"{number(found.mean, signed=signed)}{f' {ends}' if ends else ''}"


def first(row: Row) -> str:
    """What of a pair stands first: the change where that is limited, else the guarded arm; empty for a single interval."""
    if not isinstance(row.value, Paired):
        return ""
    return "guarded" if row.figure.limit is None else row.figure.limit.of


def others(row: Row) -> list[tuple[str, str]]:
    """The rest of a pair."""
    if not isinstance(row.value, Paired):
        return []
    parts = {"unguarded": row.value.unguarded, "guarded": row.value.guarded, "change": row.value.change}
    return [(name, shown(found, signed=name == "change")) for name, found in parts.items() if name != first(row)]


def limit(held: Limit) -> str:
    """`at least −2`."""
    return minus(str(held))


def told(value: Interval | Paired | None) -> str:
    """A value on one line: of a pair both means, and the change with its interval."""
    if not isinstance(value, Paired):
        return shown(value)
    before, after = (NOT_MEASURED if one is None else number(one.mean) for one in (value.unguarded, value.guarded))
    return f"{before} to {after}, {shown(value.change, signed=True)}"


def arms(value: Interval | Paired | None) -> tuple[str, str, str]:
    """Unguarded, guarded and change; a single interval stands under guarded."""
    if isinstance(value, Paired):
        return shown(value.unguarded), shown(value.guarded), shown(value.change, signed=True)
    return "", shown(value), ""
