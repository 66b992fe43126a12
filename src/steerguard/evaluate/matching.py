"""Matching: other rules and other directions that move tokens as far as a guard does.

A rule's strength is bisected until its mean |delta| over given tokens is a target; a direction of no meaning is stood among
the tokens as the guard's stands. Numbers in, rules and probes out; only `projections` asks a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Backend, Floats
from steerguard.errors import InputError
from steerguard.guard import Guard
from steerguard.metrics.reading import Exchange
from steerguard.probe import Evidence, Probe, fit_probe
from steerguard.rules import RULES, Rule, shift
from steerguard.rules import rule as rule_of

UNKNOWN = Evidence(0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0, 0)
"""What is known of how well a control's direction reads: nothing."""
CLOSE = 0.01
"""Relative difference in mean |delta| up to which an arm counts as matched."""
STEPS = 60

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """A rule at the strength at which it moves tokens as far as it should."""

    rule: Rule
    shift: float
    "mean |delta| over the tokens, in units of the residual stream"
    matched: bool
    "whether that is within one percent of what was asked for"


# ------------------------------------------------------------------------------------------------------- matching


def mean_shift(rule: Rule, probe: Probe, rho: Doubles) -> float:
    """Mean |delta| of a rule over tokens whose projections are rho `[tokens]`, in units of the residual stream."""
    return float(np.abs(shift(np, rho.astype(np.float32), rule.compile(probe).row()).astype(np.float64)).mean())


def match(name: str, probe: Probe, rho: Doubles, target: float) -> Matched:
    """The rule of that name at the strength at which its mean |delta| is `target`.

    The larger of two such strengths: beyond it, the rule moves tokens ever further.

    Raises:
        RuleError: the rule does not compile with this probe.
    """
    if target <= 0 or not len(rho):
        raise InputError(f"a displacement to match must be above 0 and over tokens, got {target} over {len(rho)}")
    cls = RULES[name]
    if not cls.grid and name != "Floor":
        found = rule_of(name)
        moved = mean_shift(found, probe, rho)
        return Matched(found, moved, abs(moved - target) <= CLOSE * target)
    # 1. strengths of which one moves less, and one more
    low = float(rho.min()) if name == "Floor" else max(cls.minimum, 0.0)
    width = max(1.0, float(np.ptp(rho)))
    high = low + width
    for _ in range(STEPS):
        if mean_shift(rule_of(name, high), probe, rho) >= target:
            break
        low, high = high, high + (width := 2 * width)
    if mean_shift(rule_of(name, low), probe, rho) > target:
        high = low  # it moves further at its least
    # 2. halve what is between
    for _ in range(STEPS):
        middle = (low + high) / 2
        if mean_shift(rule_of(name, middle), probe, rho) < target:
            low = middle
        else:
            high = middle
    found = rule_of(name, high)
    moved = mean_shift(found, probe, rho)
    return Matched(found, moved, abs(moved - target) <= CLOSE * target)


def projections(model: Backend, exchanges: Sequence[Exchange], guard: Guard, directions: Sequence[Floats]) -> list[Doubles]:
    """rho `[tokens]` along each direction of the tokens that the guard sees, read with the unguarded model."""
    layer, read = guard.layers[0], []
    for prompt, answer in exchanges:
        h = model.residuals(prompt, tuple(answer)[:-1])[layer]
        read.append(h if guard.positions == "all" else h[len(h) - max(len(answer) - 1, 0) :])
    tokens = np.concatenate(read).astype(np.float64)
    if not np.isfinite(tokens).all():
        raise InputError(f"the residuals of layer {layer} are not finite; load the model in a wider dtype")
    return [tokens @ v.astype(np.float64) for v in directions]


# ----------------------------------------------------------------------------------------------------- directions


def random_direction(width: int, rng: np.random.Generator, *, orthogonal_to: Floats | None = None) -> Floats:
    """A unit vector `[width]` of no meaning; at a right angle to another, if one is given."""
    v = rng.normal(size=width)
    if orthogonal_to is not None:
        other = orthogonal_to.astype(np.float64)
        v -= (v @ other) / (other @ other) * other
    return (v / np.linalg.norm(v)).astype(np.float32)


def shuffled_direction(pos: Floats, neg: Floats, probe: Probe, rng: np.random.Generator) -> Floats:
    """The direction that fitting finds in embeddings `[n, d]` of which half the pairs have their poles exchanged."""
    swap = np.zeros(len(pos), bool)
    swap[rng.permutation(len(pos))[: len(pos) // 2]] = True
    one, other = np.where(swap[:, None], neg, pos), np.where(swap[:, None], pos, neg)
    return fit_probe(one, other, layer=probe.layer, groups=np.arange(len(pos), dtype=np.int64)).v


def standing_as(probe: Probe, v: Floats, rho: Doubles, on_v: Doubles) -> Probe:
    """A probe along v that stands among the tokens `on_v` `[tokens]` as the guard's stands among `rho` `[tokens]`.

    As large a share of tokens lies below its boundary, and its class means and spreads are as far from it.
    """
    m = float(np.quantile(on_v, float((rho < probe.m).mean())))
    moved = m - probe.m
    return replace(probe, v=v, m=m, mu_pos=probe.mu_pos + moved, mu_neg=probe.mu_neg + moved, evidence=UNKNOWN)
