"""Rules, and the one kernel that runs them all.

Write rho = <h, v> for the residual h of one token along the unit direction v. Every single-direction rule only
moves rho, piecewise linearly with one knee:

    h' = h + delta * v
    delta = below_a + below_b * rho   if rho < knee, with rho + delta held to at most `cap`
    delta = above_a + above_b * rho   otherwise

So a rule at a strength, together with one probe's statistics, is six numbers: a `Gate`. `correct` is the reference
of the kernel: what every backend must do, on any device, in any compiled form.

This module knows the rules by name and nothing else does. It knows nothing of models, layers, tokens or files. To
add a rule, write one frozen class here under `@register`; the command line, the guard file, the sweep and the tests
find it there.

Source: arXiv 2604.08169, section 3 (SwFC, StTP, StMP).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from steerguard.errors import RuleError

INF = math.inf
CAP_SIGMAS = 40.0
"""StMP's new projection is held to mu_pos + 40 sigma_pos, as in the authors' released code."""


class Statistics(Protocol):
    """What a rule may ask of a probe: six scalars in units of the residual stream. See `probe.Probe`."""

    @property
    def m(self) -> float: ...
    @property
    def mu_pos(self) -> float: ...
    @property
    def sigma_pos(self) -> float: ...
    @property
    def mu_neg(self) -> float: ...
    @property
    def sigma_neg(self) -> float: ...
    @property
    def delta_mu(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """One rule at one strength on one layer: six float32 numbers, in units of the projection rho."""

    knee: float
    "rho below which the `below` branch acts; -inf if it never does"
    below_a: float
    below_b: float
    above_a: float
    above_b: float
    cap: float
    "upper bound of rho + delta where the below branch acted; inf for none"

    def __post_init__(self) -> None:
        slopes = (self.below_a, self.below_b, self.above_a, self.above_b)
        if not all(map(math.isfinite, slopes)) or math.isnan(self.knee) or math.isnan(self.cap):
            raise RuleError(f"{self}: the four coefficients of a gate must be finite, its knee and cap not NaN")

    def row(self) -> np.ndarray:
        """`[6]` float32, in the order of the fields: one row of a kernel's table."""
        return np.array([getattr(self, f.name) for f in fields(self)], dtype=np.float32)

    @property
    def shut(self) -> bool:
        """True if this gate can move nothing at all."""
        below = self.knee == -INF or (self.below_a == 0 and self.below_b == 0 and self.cap == INF)
        return below and self.above_a == 0 and self.above_b == 0


SHUT = Gate(-INF, 0.0, 0.0, 0.0, 0.0, INF)
"""The gate that moves nothing; slot 0 of every backend's table."""


# ------------------------------------------------------------------------------------------------ the kernel


def correct(h: Any, v: Any, gate: Any) -> tuple[Any, Any, Any]:
    """Correct residuals along one direction; the reference for every backend. numpy and torch alike.

    Args:
        h: `[..., d]` residuals, any float dtype.
        v: `[d]`, or `[..., d]` broadcastable to h (one direction per row), float32, unit norm.
        gate: `[6]`, or `[..., 6]` broadcastable to h's leading shape, float32, as `Gate.row` gives it.

    Returns:
        h': `[..., d]` in h's dtype. A token whose delta is 0 is returned bit for bit.
        rho: `[...]` float32, the projection before.
        delta: `[...]` float32, the shift of the projection.
    """
    xp = sys.modules[type(h).__module__.partition(".")[0]]
    # 1. the projection, in float32 whatever h is
    h32 = _cast(h, xp.float32)
    rho = (h32 * v).sum(-1)
    # 2. how far to move it
    delta = shift(xp, rho, gate)
    # 3. move it, then cast back; what the gate leaves alone stays bit for bit
    moved = _cast(h32 + delta[..., None] * v, h.dtype)
    return xp.where((delta != 0)[..., None], moved, h), rho, delta


def shift(xp: Any, rho: Any, gate: Any) -> Any:
    """delta `[...]` for projections rho `[...]` under gates `[..., 6]`; `xp` is numpy or torch.

    A delta that is not finite becomes 0, as in the authors' code: a residual that is broken already is left alone.
    """
    knee, below_a, below_b, above_a, above_b, cap = (gate[..., i] for i in range(6))
    below = rho < knee
    delta_below = xp.minimum(below_a + below_b * rho, cap - rho)
    delta = xp.where(below, delta_below, above_a + above_b * rho)
    return xp.where(xp.isfinite(delta), delta, xp.zeros_like(delta))


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


# ------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Rule:
    """A named way to correct a projection. Subclasses have at most one number, their strength.

    `rule.compile(probe)` is the only thing that the rest of the house asks of a rule.
    """

    summary: ClassVar[str]
    "one line for people: what happens to a token"
    grid: ClassVar[tuple[float, ...]] = ()
    "the strengths that a sweep tries; the paper's where the paper has the rule"
    minimum: ClassVar[float] = -INF
    "the smallest strength that means anything"

    def __post_init__(self) -> None:
        strength = self.strength
        if strength is None:
            return
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not number or not abs(strength) <= sys.float_info.max:  # NaN, infinities, integers that no float holds
            raise RuleError(f"{self.name}: the strength must be a finite number, got {strength!r}")
        if strength < self.minimum:
            raise RuleError(f"{self.name}: the strength must be at least {self.minimum:g}, got {strength:g}")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def strength(self) -> float | None:
        """The rule's one number, or None if it has none (or leaves it to the probe)."""
        own = fields(self)
        return getattr(self, own[0].name) if own else None

    def compile(self, probe: Statistics) -> Gate:
        """The six numbers of this rule with this probe. Raises RuleError if they do not go together."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name if self.strength is None else f"{self.name}({self.strength:g})"


RULES: dict[str, type[Rule]] = {}
"""Every rule by name, in the order of this file."""

R = TypeVar("R", bound=type[Rule])


def register(cls: R) -> R:
    RULES[cls.__name__] = cls
    return cls


def rule(name: str, strength: float | None = None) -> Rule:
    """The rule of that name at that strength: `rule("StTP", 12)`. Raises RuleError, naming what there is."""
    by_lower = {known.lower(): cls for known, cls in RULES.items()}
    cls = by_lower.get(name.lower())
    if cls is None:
        raise RuleError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    if strength is None:
        try:
            return cls()
        except TypeError:
            raise RuleError(f"{cls.__name__} needs a strength, for example {cls.__name__}({cls.grid[0]:g})") from None
    if not fields(cls):
        raise RuleError(f"{cls.__name__} has no strength, got {strength!r}")
    return cls(strength)  # type: ignore[call-arg]


def _constant(a: float, b: float = 0.0) -> Gate:
    """The same for every token: the below branch never acts."""
    return Gate(-INF, 0.0, 0.0, a, b, INF)


def _separates(rule: Rule, probe: Statistics) -> None:
    if not probe.mu_neg < probe.m < probe.mu_pos:
        raise RuleError(
            f"{rule} needs a boundary between the classes, got mu_neg {probe.mu_neg:.4g}, m {probe.m:.4g}, "
            f"mu_pos {probe.mu_pos:.4g}; choose a layer whose probe separates them, or use SwFC"
        )


@register
@dataclass(frozen=True)
class SwFC(Rule):
    """Steering with fixed correction: every token moves by alpha class separations. A negative alpha steers away."""

    alpha: float
    summary = "add alpha * delta_mu to every token"
    grid = (1, 2, 3, 4, 5)

    def compile(self, probe: Statistics) -> Gate:
        return _constant(self.alpha * probe.delta_mu)


@register
@dataclass(frozen=True)
class StTP(Rule):
    """Steering to target projection: a token below the boundary m is set to s = mu_pos + alpha * sigma_pos.

    The gate is m, not s: the new projection jumps at m.
    """

    alpha: float
    summary = "set tokens below m to mu_pos + alpha * sigma_pos"
    grid = (0, 6, 12, 18, 24, 30, 36)
    minimum = 0.0

    def compile(self, probe: Statistics) -> Gate:
        _separates(self, probe)
        return Gate(probe.m, probe.mu_pos + self.alpha * probe.sigma_pos, -1.0, 0.0, 0.0, INF)


@register
@dataclass(frozen=True)
class StMP(Rule):
    """Steering to mirrored projection: a token below the boundary m moves by 2 * alpha * (m - rho).

    alpha = 1 is the exact mirror image; the new projection is continuous at m, and held to mu_pos + 40 sigma_pos.
    """

    alpha: float
    summary = "reflect tokens below m about m, alpha times as far"
    grid = (1, 1.5, 2, 2.5, 3, 3.5, 4)
    minimum = 0.0

    def compile(self, probe: Statistics) -> Gate:
        _separates(self, probe)
        if self.alpha == 0:
            return SHUT
        cap = probe.mu_pos + CAP_SIGMAS * probe.sigma_pos
        return Gate(probe.m, 2 * self.alpha * probe.m, -2 * self.alpha, 0.0, 0.0, cap)


@register
@dataclass(frozen=True)
class Floor(Rule):
    """Activation capping from below: a token below tau is set to tau. Without a tau, the boundary m.

    tau is a projection in units of the residual stream. Floor() equals StMP(0.5).
    """

    tau: float | None = None
    summary = "set tokens below tau to tau"

    def compile(self, probe: Statistics) -> Gate:
        tau = probe.m if self.tau is None else self.tau
        return Gate(tau, tau, -1.0, 0.0, 0.0, INF)


@register
@dataclass(frozen=True)
class Ceiling(Rule):
    """Activation capping from above: a token above tau is set to tau. Without a tau, the boundary m."""

    tau: float | None = None
    summary = "set tokens above tau to tau"

    def compile(self, probe: Statistics) -> Gate:
        tau = probe.m if self.tau is None else self.tau
        return Gate(tau, 0.0, 0.0, tau, -1.0, INF)


@register
@dataclass(frozen=True)
class Target(Rule):
    """StTP without its gate: every token is set to s = mu_pos + alpha * sigma_pos."""

    alpha: float
    summary = "set every token to mu_pos + alpha * sigma_pos"
    grid = StTP.grid
    minimum = 0.0

    def compile(self, probe: Statistics) -> Gate:
        return _constant(probe.mu_pos + self.alpha * probe.sigma_pos, -1.0)


@register
@dataclass(frozen=True)
class MeanAblate(Rule):
    """Every token is set to the middle of the two class means: the direction no longer tells the classes apart."""

    summary = "set every token to (mu_pos + mu_neg) / 2"

    def compile(self, probe: Statistics) -> Gate:
        return _constant((probe.mu_pos + probe.mu_neg) / 2, -1.0)


@register
@dataclass(frozen=True)
class Watch(Rule):
    """Only look: every token is read along v and none is moved, bit for bit."""

    summary = "move nothing, only read the projections"

    def compile(self, probe: Statistics) -> Gate:
        return SHUT


@register
@dataclass(frozen=True)
class Ablate(Rule):
    """Directional ablation: the component along v is removed from every token."""

    summary = "set every token to 0"

    def compile(self, probe: Statistics) -> Gate:
        return _constant(0.0, -1.0)
