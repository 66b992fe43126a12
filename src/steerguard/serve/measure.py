"""What the guards of a request saw and did, or in shadow would have done.

A guard in shadow is put on the model with every gate shut, so it moves nothing, bit for bit, and its trace has the projection
rho of every token. What its own gate would have done follows from rho. For a guard on one layer that is exact for the text as
it stands: a correction after block i does not change what the same block makes of another token. Where a guard steers several
layers, or several guards are in shadow, each gate is judged as if it alone acted: what an earlier layer would have moved is
not in the rho of a later one. And the text stays the one that was written without the guard.

This module knows traces and gates. It knows no model and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from steerguard.backends.base import Answer, Floats, Trace
from steerguard.errors import NotSteering
from steerguard.guard import Guard
from steerguard.rules import shift
from steerguard.serve.policy import Decision, Ruled


@dataclass(frozen=True)
class Count:
    """Token-gate pairs."""

    seen: int = 0
    moved: int = 0
    "in shadow: that would have been moved"

    def __add__(self, other: Count) -> Count:
        return Count(self.seen + other.seen, self.moved + other.moved)


@dataclass(frozen=True)
class Measured:
    """One guard over all answers of one request."""

    act: Ruled
    prompt: Count
    answer: Count
    largest: float
    "largest |delta|, in units of the residual stream"
    separations: float
    "largest |delta| in class separations of its layer"

    @property
    def total(self) -> Count:
        return self.prompt + self.answer

    def as_dict(self) -> dict[str, Any]:
        """As it stands in an answer."""
        act = self.act
        return {
            "name": act.name, "digest": act.digest, "strength": act.strength, "positions": act.positions, "mode": act.mode,
            "tokens_seen": self.total.seen, "tokens_moved": self.total.moved, "largest_shift": self.largest,
        }  # fmt: skip


@lru_cache(maxsize=256)
def silenced(guard: Guard) -> Guard:
    """The guard without an effect, on all positions; the same object for the same guard, so that requests share a batch."""
    return guard.watching("all")


def installed(decision: Decision) -> tuple[Guard, ...]:
    """What is put on the model for a decision, in its order."""
    return tuple(act.guard if act.mode == "enforce" else silenced(act.guard) for act in decision.acts)


def measure(decision: Decision, answers: Sequence[Answer]) -> list[Measured]:
    """What each guard saw and did. Raises NotSteering for a gate that left no trace of every token."""
    return [_measured(i, act, answers) for i, act in enumerate(decision.acts)]


def _measured(index: int, act: Ruled, answers: Sequence[Answer]) -> Measured:
    counts = [Count(), Count()]
    largest = separations = 0.0
    for answer in answers:
        read = len(answer.prompt_ids) + len(answer.ids) - 1
        traces = [trace for trace in answer.traces if trace.guard == index]
        if [trace.layer for trace in traces] != list(act.guard.layers) or any(len(t.rho) != read for t in traces):
            raise NotSteering(f"guard {act.name!r} did not look at every token of an answer; it is not sent")
        for trace, (probe, _) in zip(traces, act.guard.gates(), strict=True):
            delta, start = deltas(act, trace, len(answer.prompt_ids))
            begin = start if act.positions == "response" else 0
            for phase, part in enumerate((delta[begin:start], delta[start:])):
                counts[phase] += Count(len(part), int(np.count_nonzero(part)))
            most = float(np.abs(delta).max(initial=0.0))
            largest, separations = max(largest, most), max(separations, most / probe.delta_mu)
    return Measured(act, counts[0], counts[1], largest, separations)


def deltas(act: Ruled, trace: Trace, prompt_tokens: int) -> tuple[Floats, int]:
    """delta `[tokens]` that a gate gave, or in shadow would have given, and where the answer begins in it."""
    if act.mode == "enforce":
        return trace.delta, prompt_tokens
    gate = next(gate for probe, gate in act.guard.gates() if probe.layer == trace.layer)
    delta: Floats = shift(np, trace.rho, gate.row())
    if act.positions == "response":
        delta[:prompt_tokens] = 0
    return delta, prompt_tokens


def projections(decision: Decision, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Per answer, guard and layer, rho and delta of every token that was read, the prompt first, as JSON values."""
    return [
        {
            "choice": choice, "guard": act.name, "layer": trace.layer, "prompt_tokens": len(answer.prompt_ids),
            "rho": [round(float(x), 4) for x in trace.rho],
            "delta": [round(float(x), 4) for x in deltas(act, trace, len(answer.prompt_ids))[0]],
        }
        for choice, answer in enumerate(answers)
        for trace in answer.traces
        for act in [decision.acts[trace.guard]]
    ]  # fmt: skip
