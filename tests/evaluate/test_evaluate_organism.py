"""Planted on the bundled model, where what steers is known: other directions do not, however far they push."""

from __future__ import annotations

from dataclasses import replace

import pytest

import steerguard as sg
from steerguard.evaluate.controls import Controls, controls
from steerguard.evaluate.scripts import scripts
from steerguard.evaluate.turns import Turns, converse
from steerguard.fitting import collect, embed, fit
from steerguard.organism.demo import SAMPLING
from steerguard.scorers import scorer_for

pytestmark = pytest.mark.slow
LAYER = 4
BENIGN = ("What is 3 plus 4?", "Say these words: purple harbour.", "Can you count up from 12 to 15?", "Hello, how are you?")


@pytest.fixture(scope="module")
def model() -> sg.Backend:
    return sg.load("organism")


@pytest.fixture(scope="module")
def trait() -> sg.Trait:
    found = sg.trait("organism-compassion")
    return replace(found, train=found.train[:40])


@pytest.fixture(scope="module")
def found(model: sg.Backend, trait: sg.Trait) -> tuple[sg.Guard, Controls]:
    contrast = collect(model, trait, sampling=SAMPLING)
    fitted = fit(model, trait, contrast=contrast, sampling=SAMPLING)
    guard = fitted.guard(sg.StTP(24), LAYER)
    pos, neg = embed(model, contrast)
    at = list(fitted).index(LAYER)
    scenarios = trait.test[:16]
    return guard, controls(
        model, scenarios, guard, scorer=scorer_for(trait), benign=BENIGN, embeddings=(pos[:, at], neg[:, at]), directions=2,
        sampling=SAMPLING,
    )  # fmt: skip


def test_the_guard_recovers_and_no_other_direction_does(found: tuple[sg.Guard, Controls]) -> None:
    """At the same displacement, random, orthogonal and shuffled directions recover less than a tenth of it."""
    result = found[1]
    guard = result.arm("guard")
    assert guard.recovered is not None and guard.recovered.mean > 77
    others = [arm for arm in result.arms if arm.family == "direction"]
    assert len(others) == 6
    for arm in others:
        assert arm.matched and arm.shift == pytest.approx(result.target, rel=0.01)
        assert arm.recovered is not None and arm.recovered.mean < guard.recovered.mean / 10, arm
        assert arm.less_than_guard is not None and arm.less_than_guard.high is not None and arm.less_than_guard.high < -50, arm


def test_the_rules_at_its_displacement_write_the_same_direction(found: tuple[sg.Guard, Controls]) -> None:
    """Negation of the above: along the fitted direction, another rule that pushes as far recovers too."""
    target = found[1].arm("Target")
    assert target.matched and target.recovered is not None and target.recovered.mean > 50
    assert all(arm.kl is not None and arm.kl.mean >= 0 for arm in found[1].arms if arm.family in ("guard", "rule"))


def test_ten_turns_with_the_guard_and_with_its_release(
    model: sg.Backend, trait: sg.Trait, found: tuple[sg.Guard, Controls]
) -> None:
    result: Turns = converse(
        model, scripts("organism-compassion")[:6], found[0], turns=10, scorer=scorer_for(trait), off_after=5, sampling=SAMPLING,
        again=False,
    )  # fmt: skip
    overall = result.overall["trait"]
    assert overall.unguarded is not None and overall.unguarded.mean < 30
    assert overall.guarded is not None and overall.guarded.mean > 70
    assert overall.change is not None and overall.change.low is not None and overall.change.low > 30
    released = [one and one.mean for one in result.by_turn["released"]["trait"]]
    guarded = [one and one.mean for one in result.by_turn["guarded"]["trait"]]
    assert released[:5] == guarded[:5]
    coherence = result.overall["coherence"].guarded
    assert coherence is not None and coherence.mean > 80
