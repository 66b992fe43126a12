"""The nouns of a sweep: settings, what they measured, and arms of a comparison.

It knows figures and how they are summed up. It knows neither how answers come nor how a setting is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError, RuleError
from steerguard.fitting import Fit
from steerguard.guard import Guard, Positions
from steerguard.metrics import recovered, repetition
from steerguard.rules import RULES, Rule, rule
from steerguard.scorers import Score

PAPER_RULES = ("SwFC", "StTP", "StMP")


class Told(Protocol):
    """What figures are made of: an `Answer`, or one that a sweep has kept."""

    @property
    def text(self) -> str: ...
    @property
    def tokens_seen(self) -> int: ...
    @property
    def tokens_moved(self) -> int: ...
    @property
    def shift(self) -> float: ...


@dataclass(frozen=True)
class Figures:
    """What one arm's answers measured. None where nothing could be scored: nothing measured is not zero."""

    trait: float | None
    "mean, 0-100"
    coherence: float | None
    "mean, 0-100"
    repetition: float
    "mean share of an answer's 4-grams that occurred in it before"
    moved: float
    "share of the tokens (prompt and answer) that the guard moved"
    shift: float
    "mean |delta| over all tokens, in units of the residual stream"
    n: int
    unscored: int
    error: float = 0.0
    "standard error of `trait`"

    @classmethod
    def of(cls, scores: Sequence[Score], answers: Sequence[Told]) -> Figures:
        seen = sum(a.tokens_seen for a in answers)
        trait = [s.trait for s in scores if s.trait is not None]
        coherence = [s.coherence for s in scores if s.coherence is not None]
        return cls(
            trait=float(np.mean(trait)) if trait else None,
            coherence=float(np.mean(coherence)) if coherence else None,
            repetition=float(np.mean([repetition(a.text) for a in answers])) if answers else 0.0,
            moved=sum(a.tokens_moved for a in answers) / seen if seen else 0.0,
            shift=sum(a.shift for a in answers) / seen if seen else 0.0,
            n=len(answers),
            unscored=len(scores) - len(trait),
            error=float(np.std(trait, ddof=1) / math.sqrt(len(trait))) if len(trait) > 1 else 0.0,
        )


@dataclass(frozen=True, eq=False)
class Scored:
    """An arm's figures, and the scores that they are the means of."""

    figures: Figures
    trait: npt.NDArray[np.float64]
    "[scenarios] 0-100, NaN where unscored"
    coherence: npt.NDArray[np.float64]
    "[scenarios] likewise"

    @classmethod
    def of(cls, scores: Sequence[Score], answers: Sequence[Told]) -> Scored:
        def array(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
            return np.array([math.nan if value is None else value for value in values], np.float64)

        return cls(Figures.of(scores, answers), array([s.trait for s in scores]), array([s.coherence for s in scores]))


@dataclass(frozen=True)
class Setting:
    """One operating point of the grid: a rule at a strength, where it acts, and on which tokens."""

    rule: Rule
    layers: tuple[int, ...]
    "one, or several that are steered together"
    positions: Positions = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or sorted(set(self.layers)) != list(self.layers):
            raise InputError(f"a setting steers at least one layer, each once and in order, got {self.layers}")

    def guard(self, probes: Fit, **chosen: Any) -> Guard:
        """The guard at this setting; `chosen` goes into its provenance."""
        return probes.guard(self.rule, self.layers, positions=self.positions, chosen=chosen or None)

    def __str__(self) -> str:
        where = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {', '.join(map(str, self.layers))}"
        return f"{self.rule} at {where}" + ("" if self.positions == "all" else f", {self.positions} tokens")


def grid(
    probes: Fit,
    *,
    rules: Sequence[str] = PAPER_RULES,
    layers: Sequence[int | Sequence[int]] | None = None,
    positions: Sequence[Positions] = ("all",),
    strengths: Mapping[str, Sequence[float]] | None = None,
) -> list[Setting]:
    """Every setting of the rules' strengths on every layer whose probe reads held-out answers.

    Args:
        layers: by default all; a sequence among them is a set of layers that are steered together.
        strengths: rule name -> the strengths to try, in place of the rule's own grid (the paper's).

    Raises:
        RuleError: a rule that does not exist or has no strengths to try.
        InputError: a layer that has no probe, or strengths of a rule that is not swept.
    """
    each = [(i,) if isinstance(i, int) else tuple(i) for i in (probes if layers is None else layers)]
    chosen = [group for group in each if not any(probes[i].evidence.weak for i in group)]
    if unknown := sorted(set(strengths or {}) - set(rules)):
        raise InputError(f"strengths are given for {', '.join(unknown)}, which is not among the rules {', '.join(rules)}")
    settings = []
    for name in rules:
        own = (strengths or {}).get(name) or (RULES.get(name) or type(rule(name))).grid
        if not own:
            having = ", ".join(n for n, c in RULES.items() if c.grid)
            raise RuleError(f"{name} has no grid of strengths; sweep one of {having}, or give strengths")
        tried = [rule(name, strength) for strength in own]
        settings += [Setting(r, group, p) for group in chosen for r in tried for p in positions]
    return settings


def gap_recovered(arm: Figures, *, aligned: Figures, malicious: Figures) -> float | None:
    """Share of the gap between malicious and aligned that an arm brings back, in percent; None if it can't be told."""
    return recovered(malicious=malicious.trait, aligned=aligned.trait, steered=arm.trait)
