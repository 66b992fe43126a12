"""Is one gate weaker than another? What a request may choose of a guard that it may not weaken.

This module knows the six numbers and nothing else.
"""

from __future__ import annotations

import math

import numpy as np

from steerguard.guard import Guard
from steerguard.rules import Gate, shift

FAR = 1e6
"""How far beyond the last knot is looked; both gates are linear there."""
TOLERANCE = 1e-5
"""Share of a shift that is rounding."""


def weaker(guard: Guard, than: Guard) -> str | None:
    """Why `guard` protects less than the other: it leaves out positions, or moves a projection less far; None if it does not.

    Both have the same probes.
    """
    if guard.positions != than.positions and guard.positions == "response":
        return "positions response leave the prompt out"
    for (probe, gate), (_, own) in zip(guard.gates(), than.gates(), strict=True):
        at = moves_less(gate, own)
        if at is not None:
            return f"{guard.rule} moves a projection of {at:.4g} on layer {probe.layer} less than {than.rule}"
    return None


def moves_less(gate: Gate, than: Gate) -> float | None:
    """A projection that `gate` moves less far than the other gate, or the other way; None if there is none.

    Both shifts are linear between knots (where a branch begins, is capped, or changes its sign), so looking at each knot
    from both sides, and far out, is looking everywhere.
    """
    knots = sorted({0.0, *_knots(gate), *_knots(than)})
    rho = np.array([x for knot in knots for x in (np.nextafter(knot, -math.inf), knot, np.nextafter(knot, math.inf))])
    rho = np.concatenate([[rho[0] - FAR], rho, [rho[-1] + FAR]])
    ours, own = (shift(np, rho, one.row().astype(np.float64)) for one in (gate, than))
    less = np.sign(own) * ours < np.abs(own) * (1 - TOLERANCE)
    return float(rho[less][0]) if less.any() else None


def _knots(gate: Gate) -> list[float]:
    knee, below_a, below_b, above_a, above_b, cap = map(float, gate.row())
    found = [knee]
    found += [-a / b for a, b in ((below_a, below_b), (above_a, above_b)) if b != 0]
    if below_b != -1:
        found.append((cap - below_a) / (1 + below_b))
    found.append(cap)
    return [knot for knot in found if math.isfinite(knot)]
