"""Answers beside each other: which scenarios went worst, and where each token stood.

What this module knows: the order of the scenarios, what changed in each, and how a token is marked. All text here is
hostile until it is escaped; nothing but `tokens` and its pieces makes markup of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from steerguard.report import wording
from steerguard.sweeping.result import BASELINES, Asked, HeldOut, Projections, Row, TestedArm, Token

LEVELS = 3
"""Shades on each side of the boundary."""
HOVER_TOKENS = 120_000
"""Tokens of a page that show their figures; those of later scenarios keep their colours, or the page grows too large."""
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def visible(text: str) -> str:
    """Text of a model as it can stand on a page: control characters as the pictures that Unicode has for them."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


# ------------------------------------------------------------------------------------------------------- worst first


@dataclass(frozen=True)
class Scenario:
    """One scenario with every arm's answer."""

    number: int
    "position in the file"
    asked: Asked
    answers: tuple[tuple[TestedArm, Row], ...]
    change: float | None
    "guarded minus malicious trait; None where either is unscored, or nothing is guarded"


@dataclass(frozen=True)
class Reliability:
    """How evenly a guard works, over the scenarios in which both answers were scored."""

    n: int
    unscored: int
    mean: float | None
    "mean change of trait"
    wrong: float | None
    "share of the scenarios that got worse"
    same: float | None
    "share that did not change"
    worst: float | None
    "mean guarded trait of the worst tenth"
    worst_n: int


def worst_first(test: HeldOut, guarded: str | None) -> list[Scenario]:
    """Every scenario: the lowest guarded trait first, then the smallest change; unscored ones last, in the file's order."""
    malicious, guard = test.arm("malicious"), test.arm(guarded)
    arms = [arm for arm in test.arms if arm.name in BASELINES]
    arms += sorted((arm for arm in test.arms if arm not in arms), key=lambda arm: arm.name != guarded)
    out = [
        Scenario(i, asked, tuple((arm, arm.rows[i]) for arm in arms), _change(malicious, guard, i))
        for i, asked in enumerate(test.scenarios)
    ]
    if guard is None:
        return out

    def badness(scenario: Scenario) -> tuple[bool, float, float]:
        trait = guard.rows[scenario.number].trait
        return trait is None, 0.0 if trait is None else trait, math.inf if scenario.change is None else scenario.change

    return sorted(out, key=badness)


def reliability(scenarios: Sequence[Scenario], guarded: str) -> Reliability:
    changes = [s.change for s in scenarios if s.change is not None]
    rows = [row for s in scenarios for arm, row in s.answers if arm.name == guarded]
    traits = sorted(row.trait for row in rows if row.trait is not None)
    tenth = traits[: math.ceil(len(traits) / 10)]
    return Reliability(
        n=len(changes),
        unscored=len(scenarios) - len(changes),
        mean=float(np.mean(changes)) if changes else None,
        wrong=sum(c < 0 for c in changes) / len(changes) if changes else None,
        same=sum(c == 0 for c in changes) / len(changes) if changes else None,
        worst=float(np.mean(tenth)) if tenth else None,
        worst_n=len(tenth),
    )


def _change(malicious: TestedArm | None, guard: TestedArm | None, i: int) -> float | None:
    if malicious is None or guard is None:
        return None
    before, after = malicious.rows[i].trait, guard.rows[i].trait
    return None if before is None or after is None else after - before


# ------------------------------------------------------------------------------------------------------------ tokens


@dataclass
class Budget:
    """How many tokens may still show their figures."""

    left: int = field(default=HOVER_TOKENS)

    def spend(self, n: int) -> bool:
        """True, and n fewer are left, if there were as many."""
        if n > self.left:
            return False
        self.left -= n
        return True


def tokens(row: Row, read: Projections | None, budget: Budget) -> Markup:
    """An answer's text, its tokens shaded by where they stood and underlined where they were moved.

    Without tokens, or without a boundary to measure them from, the text as it is.
    """
    if row.tokens is None or read is None:
        return escape(visible(row.text))
    said = "".join(token.piece for token in row.tokens)
    rest = row.text[len(said) :] if row.text.startswith(said) else ""
    spread = max(abs(read.mu_pos - read.mu_neg) / 2, 1e-9)
    shades = [_shade(token, read.m, spread) for token in row.tokens]
    if budget.spend(len(shades)):
        parts = [_token(token, shade) for token, shade in zip(row.tokens, shades, strict=True)]
    else:
        parts = _runs(row.tokens, shades)
    return Markup("".join(parts)) + escape(visible(rest))


def _shade(token: Token, m: float, spread: float) -> str:
    """A class: n3 .. n1 below the boundary, z at it, p1 .. p3 above; u if it was moved."""
    level = round(LEVELS * min(1.0, abs(token.rho - m) / spread))
    side = "z" if level == 0 else f"{'n' if token.rho < m else 'p'}{level}"
    return f"{side} u" if token.delta else side


def _token(token: Token, shade: str) -> str:
    figures = f"ρ {wording.compact(token.rho)}"
    if token.delta:
        figures += f" → {wording.compact(token.rho + token.delta)}"
    return f'<i class="{shade}" title="{figures}">{escape(visible(token.piece))}</i>'


def _runs(all_tokens: Sequence[Token], shades: Sequence[str]) -> list[str]:
    """Neighbours of one shade as one run, without figures."""
    out: list[str] = []
    start = 0
    for i in range(1, len(shades) + 1):
        if i == len(shades) or shades[i] != shades[start]:
            piece = "".join(token.piece for token in all_tokens[start:i])
            out.append(f'<i class="{shades[start]}">{escape(visible(piece))}</i>')
            start = i
    return out
