"""The proof itself: what it prints, what it costs, and that it works inside another guard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench import Bench

from steerguard.backends.fake import Fault, load
from steerguard.backends.proof import CHECKS, Finding, audit, examine, prove
from steerguard.backends.proof.canary import shift
from steerguard.errors import NotSteering
from steerguard.rules import Ceiling, Floor, Gate, StMP, StTP, SwFC, correct


@pytest.fixture
def bench(folders: dict[str, Path]) -> Bench:
    return Bench(load(folders["tiny"]), folders["tiny"])


def test_findings_name_every_check_and_what_was_measured(bench: Bench) -> None:
    findings = examine(bench.model, [bench.guard(StTP(6), (1, 2))])
    assert [finding.check for finding in findings] == [*CHECKS, "guarded"]
    assert all(finding.passed and finding.detail for finding in findings)
    assert str(Finding("effect", False, "nothing moved")) == "FAIL effect: nothing moved"
    assert str(findings[1]).startswith("pass rule: ")


def test_failures_say_where_and_by_how_much(folders: dict[str, Path]) -> None:
    bench = Bench(load(folders["tiny"], fault=Fault.HALF_SHIFT), folders["tiny"])
    by_name = {finding.check: finding for finding in examine(bench.model, [bench.guard(SwFC(1), (2,))])}
    assert not by_name["effect"].passed
    assert "layer 2" in by_name["effect"].detail
    assert "expected" in by_name["effect"].detail
    assert not by_name["guarded"].passed


def test_a_guard_is_proved_on_top_of_those_entered(bench: Bench) -> None:
    first, second = bench.guard(Ceiling(), (1,), name="first"), bench.guard(StMP(2), (1, 3), seed=1, name="second")
    with bench.model.guarded(first):
        assert all(finding.passed for finding in prove(bench.model, [second, first]))


def test_a_model_that_ends_every_turn_at_once_is_proved_on_drawn_tokens(bench: Bench) -> None:
    assert all(finding.passed for finding in prove(bench.model, [bench.ender()]))


def test_residuals_that_are_not_finite_prove_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = bench.model.residuals

    def broken(*args: object, **options: object) -> np.ndarray:
        h = residuals(*args, **options)  # type: ignore[arg-type]
        h[2, 3, 4] = np.nan
        return h

    monkeypatch.setattr(bench.model, "residuals", broken)
    findings = prove(bench.model, [bench.guard(SwFC(1))])
    assert "layers [2] are not finite" in next(f.detail for f in findings if not f.passed)


def test_a_model_that_does_not_repeat_itself_is_judged_within_its_noise(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices add up in another order each time; that alone is no fault, and hides none."""
    rng, residuals = np.random.default_rng(0), bench.model.residuals
    monkeypatch.setattr(
        bench.model,
        "residuals",
        lambda *args, **options: (lambda h: h * (1 + 1e-7 * rng.normal(size=h.shape)).astype(np.float32))(
            residuals(*args, **options)
        ),
    )
    guard = bench.guard(StTP(6), (1, 3))
    assert [str(finding) for finding in prove(bench.model, [guard]) if not finding.passed] == []
    monkeypatch.setattr(bench.model, "fault", Fault.HALF_SHIFT)
    assert not all(finding.passed for finding in prove(bench.model, [guard]))


def test_the_arithmetic_of_the_proof_is_not_the_kernels_but_agrees_with_it() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        knee, below_a, below_b, above_a, above_b = rng.normal(size=5)
        gate = Gate(knee, below_a, below_b, above_a, above_b, float(rng.choice([np.inf, abs(knee) + 0.5])))
        h = rng.normal(size=(40, 1)).astype(np.float32) * 3
        delta = correct(h, np.ones(1, np.float32), gate.row())[2]
        np.testing.assert_allclose(shift(h[:, 0], gate), delta, atol=1e-5)


def test_the_count_at_the_end_of_a_call(bench: Bench) -> None:
    guards = [bench.guard(Floor(), (1, 2)), bench.guard(SwFC(1), (0,), positions="response")]
    audit(guards, prompt_length=5, tokens=9, seen=2 * 9 + 4)
    audit([], prompt_length=5, tokens=9, seen=0)
    with pytest.raises(NotSteering, match="looked at 21 token-gate pairs of 9 tokens, expected 22"):
        audit(guards, prompt_length=5, tokens=9, seen=21)
