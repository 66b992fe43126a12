"""What is measured of a request, from answers and traces alone: every gate at every token, or no answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steerguard.backends.base import Answer, Trace
from steerguard.errors import NotSteering
from steerguard.guard import Guard, ModelIdentity, Positions
from steerguard.rules import StMP, StTP
from steerguard.serve.measure import Count, installed, measure, projections, silenced
from steerguard.serve.policy import Decision, Ruled
from steerguard.serve.policy_file import Mode
from tiny import guard as make_guard
from tiny import probe

IDENTITY = ModelIdentity("tiny", "Toy", 8, 6, {"w": "0" * 64}, "1" * 64, "2" * 64)


def ruled(guard: Guard, mode: Mode) -> Ruled:
    return Ruled(guard.name, guard.digest, guard.rule.strength, guard.positions, mode, False, guard)


def guard_of(name: str, layers: tuple[int, ...], positions: Positions = "all") -> Guard:
    return make_guard(IDENTITY, StTP(8), tuple(probe(layer, 8) for layer in layers), positions=positions, name=name)


RHO = np.array([-2, 0.5, -1, 3, -0.25, 1], np.float32)
"""Three tokens of a prompt, three of an answer; the boundary of every probe is 0, the target 2."""
DELTA = np.array([4, 0, 3, 0, 2.25, 0], np.float32)
NOTHING = np.zeros_like(RHO)


def answer(*traces: Trace) -> Answer:
    return Answer("text", (1, 2, 3), (4, 5, 6, 7), "length", traces=traces)


def test_at_work_the_trace_is_counted_and_in_shadow_the_gate_is_asked() -> None:
    one, other = guard_of("one", (1, 4)), guard_of("other", (2,), "response")
    decision = Decision((ruled(one, "enforce"), ruled(other, "shadow")))
    traces = (Trace(0, 1, RHO, DELTA), Trace(0, 4, RHO, NOTHING), Trace(1, 2, RHO, NOTHING))
    at_work, shadow = measure(decision, [answer(*traces)] * 2)
    assert (at_work.prompt, at_work.answer) == (Count(12, 4), Count(12, 2))
    assert (at_work.largest, at_work.separations) == (4.0, 2.0)  # the class means stand 2 apart
    assert (shadow.prompt, shadow.answer) == (Count(0, 0), Count(6, 2))
    assert shadow.largest == 2.25
    shown = projections(decision, [answer(*traces)])
    assert [(one["guard"], one["layer"], one["delta"]) for one in shown] == [
        ("one", 1, [4, 0, 3, 0, 2.25, 0]), ("one", 4, [0] * 6), ("other", 2, [0, 0, 0, 0, 2.25, 0]),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_gate_that_left_no_trace_of_every_token_is_no_answer(mode: Mode) -> None:
    decision = Decision((ruled(guard_of("one", (1, 4)), mode),))
    full = (Trace(0, 1, RHO, DELTA), Trace(0, 4, RHO, NOTHING))
    assert measure(decision, [answer(*full)])
    short = Trace(0, 4, RHO[:-1], NOTHING[:-1])
    for traces in (
        (),
        full[:1],
        full[1:],
        (full[0], short),
        (full[0], replace(full[1], layer=3)),
        (full[0], replace(full[1], guard=1)),
    ):
        with pytest.raises(NotSteering, match="did not look at every token"):
            measure(decision, [answer(*full), answer(*traces)])


def test_what_is_installed_in_shadow_moves_nothing_and_looks_everywhere() -> None:
    mirror = make_guard(IDENTITY, StMP(3), (probe(1, 8), probe(3, 8)), positions="response", name="mirror")
    own, shut = installed(Decision((ruled(mirror, "enforce"), ruled(mirror, "shadow"))))
    assert own is mirror
    assert shut is silenced(mirror)
    assert shut.layers == mirror.layers
    assert shut.positions == "all"
    assert all(gate.shut for _, gate in shut.gates())
    assert not any(gate.shut for _, gate in mirror.gates())
