"""Verdicts: what a judge's reply says, or why it says nothing.

A reply is read generously and believed strictly: a JSON object may stand in prose or in a code block, but a number out
of range, a verdict that is missing, and two verdicts that differ are no verdict. Nothing is guessed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from steerguard.files import shown
from steerguard.judging.prompts import CHOICES, SCALES, Kind

MAX_REASON = 4000
"""Characters of a reason that are kept."""
MAX_REPLY = 200_000
_NUMBER = re.compile(r"\s*[-+]?\d{1,4}(?:\.\d{1,6})?\s*")


@dataclass(frozen=True)
class Verdict:
    """What one judge said of one answer once."""

    value: float | str
    "a number on the kind's scale; of a pair: first, second or tie"
    reason: str


class NoVerdict(Exception):
    """A reply that holds no verdict; the message says why."""


def read_verdict(kind: Kind, reply: str) -> Verdict:
    """The verdict of a reply. Raises NoVerdict."""
    key = "winner" if kind == "pair" else "score"
    if not reply.strip():
        raise NoVerdict("the judge said nothing")
    found = [one for one in _objects(reply[:MAX_REPLY]) if key in one]
    if not found:
        raise NoVerdict(f"the judge's reply holds no JSON object with a {key!r}: {shown(reply.strip())}")
    values = {_value(kind, one[key]) for one in found}
    if len(values) > 1:
        raise NoVerdict(f"the judge gave several verdicts that differ: {', '.join(sorted(map(str, values)))}")
    reasons = [one["reason"] for one in found if isinstance(one.get("reason"), str)]
    reason = reasons[-1].encode("utf-8", "replace").decode().strip() if reasons else ""
    return Verdict(values.pop(), reason[:MAX_REASON])


def _value(kind: Kind, value: Any) -> float | str:
    if kind == "pair":
        winner = value.strip().lower() if isinstance(value, str) else value
        if winner not in CHOICES:
            raise NoVerdict(f"the judge's winner must be {', '.join(CHOICES)}, got {shown(value)}")
        return str(winner)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    low, high = SCALES[kind]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NoVerdict(f"the judge's score must be a number, got {shown(value)}")
    if not low <= value <= high:
        raise NoVerdict(f"the judge's score must be {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def _objects(text: str) -> list[dict[str, Any]]:
    """The outermost JSON objects of a text, in order; what is quoted inside one is none of them."""
    decoder = json.JSONDecoder(strict=False)  # judges put line breaks into their reasons
    found: list[dict[str, Any]] = []
    at = text.find("{")
    while at >= 0 and len(found) < 100:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found.append(value)
        at = text.find("{", end)
    return found
