"""Controls: the matching by hand, directions that are what they say, and every arm on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import steerguard as sg
import tiny
from steerguard.errors import InputError, RuleError
from steerguard.evaluate.controls import COMPARED, FOUND, Controls, controls
from steerguard.evaluate.matching import (
    match,
    mean_shift,
    projections,
    random_direction,
    shuffled_direction,
    standing_as,
)
from steerguard.evaluate.results import as_json
from steerguard.fitting import prompts_of
from steerguard.metrics.benign import fires
from steerguard.metrics.likelihood import divergences
from steerguard.probe import Probe, fit_probe
from steerguard.scorers import Score
from steerguard.traits import Scenario

SHORT = sg.Sampling(max_new_tokens=6, temperature=1.0)
SCENARIOS = [Scenario(f"s{i}", "all", f"{i}: tell the truth.", f"{i}: lie.", (f"What is day {i}?",)) for i in range(6)]
BENIGN = ["Hello.", "Tell me a day.", "What is a week?"]


class ByText:
    """A scorer whose scores are a function of the text."""

    identity = MappingProxyType({"scorer": "by text"})

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        return [Score(float(sum(answer.encode()) % 101), float(sum(answer.encode()) % 97)) for answer in answers]


@pytest.fixture(scope="module")
def probe(model: sg.Backend) -> Probe:
    rho = np.concatenate([model.residuals(prompts_of(one)[1])[2] for one in SCENARIOS])
    return tiny.probe(2, 48, rho=rho)


@pytest.fixture(scope="module")
def own(model: sg.Backend, probe: Probe) -> sg.Guard:
    return tiny.guard(model.identity, sg.StTP(12), (probe,), name="own")


@pytest.fixture(scope="module")
def found(model: sg.Backend, own: sg.Guard) -> Controls:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(20, 48)).astype(np.float32), rng.normal(size=(20, 48)).astype(np.float32)
    return controls(
        model, SCENARIOS, own, scorer=ByText(), benign=BENIGN, embeddings=embeddings, directions=1, sampling=SHORT
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize("target", [0.3, 1.0, 7.5])
def test_a_constant_is_matched_by_what_it_is(probe: Probe, target: float) -> None:
    found = match("SwFC", probe, np.linspace(-3, 3, 50), target)
    assert found.matched and found.shift == pytest.approx(target, rel=1e-5)
    assert found.rule.strength == pytest.approx(target / probe.delta_mu, rel=1e-5)


@pytest.mark.parametrize("rule", ["StTP", "StMP", "Floor", "Target", "SwFC"])
def test_every_rule_moves_as_far_as_it_should(probe: Probe, rule: str) -> None:
    rho = np.random.default_rng(0).normal(probe.m, 2.0, 400)
    strong = mean_shift(sg.rule("StTP", 20), probe, rho)
    found = match(rule, probe, rho, strong)
    assert found.matched and found.shift == pytest.approx(strong, rel=1e-3)
    assert mean_shift(found.rule, probe, rho) == found.shift
    gate = found.rule.compile(probe)
    by_hand = sum(abs(min(gate.below_a + gate.below_b * r, gate.cap - r)) for r in rho if r < gate.knee)
    if rule in ("StTP", "StMP"):
        assert found.shift == pytest.approx(by_hand / 400, rel=1e-4)


def test_what_cannot_be_matched_says_so(probe: Probe) -> None:
    rho = np.random.default_rng(0).normal(probe.m, 2.0, 400)
    least = mean_shift(sg.StTP(0), probe, rho)
    found = match("StTP", probe, rho, least / 2)
    assert (
        not found.matched and found.shift == pytest.approx(least, rel=1e-5) and found.rule.strength == pytest.approx(0, abs=1e-6)
    )
    ablated = match("Ablate", probe, rho, 10.0)
    assert not ablated.matched and ablated.shift == pytest.approx(np.abs(rho).mean(), rel=1e-5)
    capped = match("StMP", replace(probe, sigma_pos=0.0), rho, 1e6)
    assert not capped.matched
    with pytest.raises(InputError, match="above 0"):
        match("SwFC", probe, rho, 0.0)


def test_the_displacement_is_what_a_guard_does_to_these_tokens(model: sg.Backend, own: sg.Guard, probe: Probe) -> None:
    """The same as `metrics.benign.fires` tells, which is another way to it."""
    plain = model.generate([prompts_of(one)[1] for one in SCENARIOS], sampling=SHORT)
    exchanges = [(prompts_of(one)[1], answer.ids) for one, answer in zip(SCENARIOS, plain, strict=True)]
    for positions in ("all", "response"):
        guard = replace(own, positions=positions)
        (rho,) = projections(model, exchanges, guard, [probe.v])
        fired = fires(model, exchanges, {"g": guard})["g"]
        seen = sum(one.seen for one in fired)
        assert len(rho) == seen
        expected = sum(one.total_shift for one in fired) * probe.delta_mu / seen
        assert mean_shift(guard.rule, probe, rho) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------ directions


def test_directions_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    v = random_direction(64, rng)
    at_right_angle = random_direction(64, rng, orthogonal_to=v)
    assert np.linalg.norm(v) == pytest.approx(1, abs=1e-6) and np.linalg.norm(at_right_angle) == pytest.approx(1, abs=1e-6)
    assert abs(float(v @ at_right_angle)) < 1e-6
    assert abs(float(v @ random_direction(64, rng))) > 1e-4


def test_shuffled_labels_lose_the_direction() -> None:
    """Poles that lie apart along one axis: fitting finds it, and on labels drawn by lot it does not."""
    rng = np.random.default_rng(0)
    axis = random_direction(32, rng)
    pos = (rng.normal(size=(60, 32)) + 3 * axis).astype(np.float32)
    neg = (rng.normal(size=(60, 32)) - 3 * axis).astype(np.float32)
    fitted = fit_probe(pos, neg, layer=0, groups=np.arange(60))
    assert float(fitted.v @ axis) > 0.9
    cosines = [float(shuffled_direction(pos, neg, fitted, np.random.default_rng(i)) @ axis) for i in range(5)]
    assert max(map(abs, cosines)) < 0.7 and abs(float(np.mean(cosines))) < 0.4


def test_a_control_stands_as_the_guard_does(probe: Probe) -> None:
    rng = np.random.default_rng(0)
    rho, other = rng.normal(probe.m + 1, 2.0, 1000), rng.normal(40, 0.1, 1000)
    control = standing_as(probe, tiny.direction(48, 7), rho, other)
    assert (other < control.m).mean() == pytest.approx((rho < probe.m).mean(), abs=2e-3)
    assert control.mu_pos - control.m == pytest.approx(probe.mu_pos - probe.m)
    assert control.delta_mu == pytest.approx(probe.delta_mu) and control.sigma_pos == probe.sigma_pos
    assert control.evidence.weak


# ------------------------------------------------------------------------------------------------ all of it


def test_every_arm_is_there_and_moves_as_far(found: Controls) -> None:
    names = [arm.name for arm in found.arms]
    assert names == ["unguarded", "aligned", "guard", "random-1", "orthogonal-1", "shuffled-1", *FOUND, *COMPARED, "ungated"]
    for arm in found.arms[2:]:
        assert arm.trait is not None and arm.trait.n == 6 and arm.coherence is not None and arm.kl is not None and arm.kl.n == 3
        if arm.matched:
            assert arm.shift == pytest.approx(found.target, rel=0.01), arm.name
        else:
            assert abs(arm.shift / found.target - 1) > 0.01, arm.name
    assert [arm.name for arm in found.arms if not arm.matched] == ["Ablate", "ungated"]
    ungated = found.arm("ungated")
    assert set(found.fits) == set(FOUND) and all(abs(cosine) < 0.99 for cosine in found.fits.values())
    assert ungated.shift > found.target and ungated.rule == "Target(12)"
    orthogonal, random = found.arm("orthogonal-1").cosine, found.arm("random-1").cosine
    assert orthogonal is not None and random is not None and abs(orthogonal) < 1e-5 < abs(random) < 0.6
    assert json.loads(json.dumps(as_json(found)))["arms"][2]["name"] == "guard"
    assert "NOT matched" in str(found)
    with pytest.raises(InputError, match="random-1"):
        found.arm("nothing")


def test_directions_of_a_kind_are_taken_together(found: Controls) -> None:
    """One direction of each kind: together they are what it is by itself."""
    assert {kind: found.arm(f"{kind}-1").of_guard for kind in ("random", "orthogonal", "shuffled")} == dict(found.pooled)


def test_the_rules_own_arm_at_its_own_displacement_is_the_guard(found: Controls) -> None:
    same, guard = found.arm("StTP"), found.arm("guard")
    assert (same.rule, same.trait, same.kl) == (guard.rule, guard.trait, guard.kl)


def test_figures_are_those_of_the_answers(found: Controls, model: sg.Backend, own: sg.Guard) -> None:
    scorer = ByText()

    def trait(guards: Any, pole: int) -> list[float]:
        answers = [model.generate(prompts_of(one)[pole], guards=guards, sampling=SHORT)[0].text for one in SCENARIOS]
        return [score.trait or 0.0 for score in scorer.scores(SCENARIOS, answers)]

    plain, aligned, on = trait(None, 1), trait(None, 0), trait(own, 1)
    guard = found.arm("guard")
    assert guard.trait is not None and guard.change is not None and guard.less_than_guard is not None
    assert guard.trait.mean == pytest.approx(np.mean(on))
    assert guard.change.mean == pytest.approx(np.mean(on) - np.mean(plain))
    assert (guard.less_than_guard.mean, guard.less_than_guard.low) == (0, 0)
    baseline, best = found.arm("unguarded"), found.arm("aligned")
    assert baseline.trait is not None and baseline.trait.mean == pytest.approx(np.mean(plain)) and baseline.kl is None
    assert best.trait is not None and best.trait.mean == pytest.approx(np.mean(aligned))
    if np.mean(aligned) > np.mean(plain):
        assert guard.recovered is not None
        expected = 100 * (np.mean(on) - np.mean(plain)) / (np.mean(aligned) - np.mean(plain))
        assert guard.recovered.mean == pytest.approx(expected)
    answers = model.generate(BENIGN, sampling=SHORT)
    kl = divergences(model, [(p, a.ids) for p, a in zip(BENIGN, answers, strict=True)], {"g": own})["g"]
    assert guard.kl is not None and guard.kl.mean == pytest.approx(np.mean([k for k in kl if k is not None]))


@pytest.mark.parametrize("case", ["none", "several layers", "moves nothing", "unknown rule"])
def test_what_cannot_be_controlled_is_refused(model: sg.Backend, own: sg.Guard, case: str) -> None:
    several = tiny.guard(model.identity, sg.SwFC(1), (tiny.probe(1, 48), tiny.probe(2, 48)))
    options: dict[str, Any] = {"scorer": ByText(), "sampling": SHORT, "directions": 1}
    scenarios, guard, error = SCENARIOS, own, InputError
    if case == "none":
        scenarios = []
    if case == "several layers":
        guard = several
    if case == "moves nothing":
        guard = replace(own, rule=sg.SwFC(0))
    if case == "unknown rule":
        options["rules"], error = ["SwFX"], RuleError
    with pytest.raises(error):
        controls(model, scenarios, guard, **options)
