"""Canaries: guards whose effect is known whatever the prompt, and the arithmetic that their effect is compared with.

The arithmetic is float64 and written from the definition of the six numbers, not from the kernel, so that `proof` does
not check a mistake against itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Answer, Backend, Floats, Sampling
from steerguard.errors import NotSteering
from steerguard.guard import Guard, Positions
from steerguard.probe import Probe
from steerguard.rules import Floor, Gate, Rule, Target

PROMPTS = ("Say in one sentence what you did today.", "Hello.", "Which is longer, a day or a week, and why?")
ANSWER = "I read a book and then went for a walk."
STEPS = 4
"""Tokens that the proof generates."""
FAR_BELOW = -1e9
"""A floor that no projection reaches: a live gate that never moves a token."""


class Canary:
    """A model, the guards to be proved on it, and the canaries made of them."""

    def __init__(self, model: Backend, guards: tuple[Guard, ...]) -> None:
        self.model, self.guards = model, guards

    @cached_property
    def base(self) -> Floats:
        """[layers, tokens, d] residuals of the canary text, unguarded. Raises NotSteering if they are not finite."""
        base = self.residuals()
        broken = np.nonzero(~np.isfinite(base).all(axis=(1, 2)))[0].tolist()
        if broken:
            raise NotSteering(f"the unguarded residuals of layers {broken} are not finite; load it in a wider dtype")
        return base

    @cached_property
    def base_logits(self) -> Floats:
        return self.model.logits(PROMPTS[0], ANSWER)

    @cached_property
    def answer_start(self) -> int:
        return int(self.model.residuals(PROMPTS[0]).shape[1])

    @cached_property
    def resolution(self) -> float:
        """Spacing of the residual's dtype relative to its size, read off the bits: the protocol names no dtype."""
        bits = np.ascontiguousarray(self.base).view(np.uint32)
        if not (bits & 0xFFFF).any():
            return 2.0**-8  # bfloat16
        with np.errstate(over="ignore"):
            half = self.base.astype(np.float16).astype(np.float32)
        return 2.0**-11 if np.array_equal(half, self.base) else 2.0**-23

    @cached_property
    def repeats(self) -> bool:
        """Whether the unguarded model gives the same bits twice; on some devices it does not."""
        again = self.model.residuals(PROMPTS[0], ANSWER), self.model.logits(PROMPTS[0], ANSWER)
        return np.array_equal(again[0], self.base) and np.array_equal(again[1], self.base_logits)

    def same(self, x: Floats, y: Floats) -> bool:
        """Whether two results are the same bits; the same within `loose` on a model that does not repeat itself."""
        if self.repeats or not x.size:
            return np.array_equal(x, y)
        return x.shape == y.shape and bool(np.allclose(x, y, rtol=self.loose, atol=self.loose * float(np.abs(y).mean())))

    @property
    def loose(self) -> float:
        """Relative tolerance between two ways of computing the same residual, such as cached and in one forward."""
        return 1e-3 + 16 * self.resolution

    @property
    def gates(self) -> list[tuple[int, int, Probe, Gate, Guard]]:
        """(layer, guard index, probe, gate, guard) in the order in which they act."""
        every = [(p.layer, i, p, gate, guard) for i, guard in enumerate(self.guards) for p, gate in guard.gates()]
        return sorted(every, key=lambda entry: entry[:2])

    def residuals(self, *guards: Guard) -> Floats:
        """[layers, tokens, d] of the canary text."""
        return self.model.residuals(PROMPTS[0], ANSWER, guards=guards)

    def size(self, layer: int) -> float:
        """The typical length of a residual at a layer."""
        return float(np.median(np.linalg.norm(self.base[layer].astype(np.float64), axis=-1)))

    def loud(self, guard: Guard, sizes: float, *, layers: Sequence[int] | None = None, positions: Positions = "all") -> Guard:
        """Sets every token to `sizes` typical lengths along v, on the guard's layers or on those that are named."""
        chosen = [p for p in guard.probes if layers is None or p.layer in layers]
        moved = tuple(aimed(p, sizes * self.size(p.layer)) for p in chosen)
        return replace(guard, probes=moved, rule=Target(0.0), positions=positions)

    def one(self, guard: Guard, probe: Probe, rule: Rule) -> Guard:
        """A rule on one layer of a guard, at every position."""
        return replace(guard, probes=(probe,), rule=rule, positions="all")

    def witnesses(self, guards: Sequence[Guard]) -> tuple[Guard, ...]:
        """For each guard one that moves nothing: its trace shows what the guard's first layer and every later one hold
        along its direction."""
        return tuple(
            replace(
                guard,
                probes=tuple(replace(guard.probes[0], layer=n) for n in range(guard.layers[0], self.model.identity.depth)),
                rule=Floor(FAR_BELOW),
                positions="all",
            )
            for guard in guards
        )

    def generate(
        self, prompts: Sequence[str], guards: Sequence[tuple[Guard, ...]], sampling: Sampling | None = None
    ) -> list[Answer]:
        """Traced answers, greedy unless told otherwise; one tuple of guards per prompt."""
        greedy = Sampling(temperature=0.0, max_new_tokens=STEPS)
        return self.model.generate(list(prompts), guards=list(guards), sampling=sampling or greedy, trace=True)

    def reread(self, prompt: str, ids: Sequence[int], guards: Sequence[Guard]) -> tuple[Floats, Floats]:
        """Residuals and logits of a prompt and the tokens of an answer to it, in one forward each.

        By ids: the text of an answer need not give its own tokens again.
        """
        model: Any = self.model
        return model.residuals(prompt, tuple(ids), guards=guards), model.logits(prompt, tuple(ids), guards=guards)


def aimed(probe: Probe, s: float) -> Probe:
    """The probe with its statistics such that Target(0) sets a projection to s."""
    return replace(probe, m=s, mu_neg=s, mu_pos=s, sigma_pos=0.0, sigma_neg=0.0)


def shift(rho: npt.NDArray[np.floating[Any]], gate: Gate) -> npt.NDArray[np.float64]:
    """delta `[tokens]` of projections, in float64, token by token as the six numbers are defined."""
    out = np.zeros(len(rho))
    for i, at in enumerate(rho.astype(np.float64)):
        below = at < gate.knee
        out[i] = gate.below_a + gate.below_b * at if below else gate.above_a + gate.above_b * at
        if below and at + out[i] > gate.cap:
            out[i] = gate.cap - at
    return out


def tolerance(canary: Canary, h: Floats) -> npt.NDArray[np.float64]:
    """[tokens, d] how far a moved residual may lie from the exact one: rounding to its dtype, and float32 sums."""
    exact = h.astype(np.float64)
    sums: npt.NDArray[np.float64] = 1e-5 * np.linalg.norm(exact, axis=-1, keepdims=True)
    return 2 * canary.resolution * np.abs(exact) + sums


def compare(canary: Canary, after: Floats, before: Floats, probe: Probe, gate: Gate, first: int, what: str) -> float:
    """Compare residuals `[tokens, d]` of one layer with what a gate makes of those of before, from position `first` on.

    Tokens so near the knee that rounding decides are left out. Returns the largest error relative to the largest shift.
    """
    h, v = before.astype(np.float64), probe.v.astype(np.float64)
    rho = h @ v
    # 1. what should be
    delta = np.where(np.arange(len(h)) >= first, shift(rho, gate), 0)
    expected = h + delta[:, None] * v
    sure = np.abs(rho - gate.knee) > 1e-5 * np.linalg.norm(h, axis=-1)
    # 2. what the gate leaves alone is left bit for bit
    alone = sure & (delta == 0)
    if not canary.same(after[alone], before[alone]):
        touched = np.nonzero(alone & (after != before).any(-1))[0]
        raise NotSteering(f"{what}: positions {touched.tolist()} should have been left alone and were moved")
    # 3. what it moves is moved by the right amount
    error = np.abs(after - expected)
    wrong = sure & ~(error <= tolerance(canary, expected.astype(np.float32))).all(-1)
    if wrong.any():
        i = int(np.nonzero(wrong)[0][0])
        raise NotSteering(
            f"{what}: {int(wrong.sum())} of {len(h)} tokens were not moved as the rule says; the projection of "
            f"position {i} went from {rho[i]:.4g} to {after[i] @ v:.4g}, expected {rho[i] + delta[i]:.4g}"
        )
    return float(error[sure].max(initial=0.0) / max(float(np.abs(delta).max(initial=0.0)), 1e-30)) if delta.any() else 0.0
