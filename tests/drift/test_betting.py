"""Betting: the rates of false alarms that it states, met and nearly used up; and what it finds when they should be raised."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from traffic import log_mean

from steerguard.drift.betting import Evidence, interval, mean_of, nothing, one

ALPHA, EVERY = 0.1, 300
Doubles = npt.NDArray[np.float64]


def play(x: Doubles, bound: float) -> tuple[Doubles, Doubles]:
    """log evidence `[runs, steps]` of x `[runs, steps]` against "the mean is at most `bound`"."""
    state = nothing(len(x))
    total, recent = [], []
    for t in range(x.shape[1]):
        state = state.then(one(x[:, t], np.full(len(x), bound)))
        total.append(state.capital())
        recent.append(state.detector())
    return np.stack(total, 1), np.stack(recent, 1)


def coins(rng: np.random.Generator, runs: int, steps: int, bound: float) -> Doubles:
    """Numbers whose mean is exactly the bound, whatever came before, and whose spread depends on it: coins after a tail,
    narrow after a head."""
    x = np.empty((runs, steps))
    x[:, 0] = rng.random(runs) < bound
    for t in range(1, steps):
        narrow = np.clip(bound + 0.1 * rng.choice([-1, 1], runs), 0, 1)
        x[:, t] = np.where(x[:, t - 1] >= bound, narrow, rng.random(runs) < bound)
    return x


@pytest.mark.parametrize("bound", [0.15, 0.5])
@pytest.mark.parametrize("kind", ["independent", "dependent"])
def test_the_capital_rarely_grows_at_fair_odds(bound: float, kind: str) -> None:
    rng = np.random.default_rng(0)
    runs, steps = 800, 600
    x = (rng.random((runs, steps)) < bound).astype(float) if kind == "independent" else coins(rng, runs, steps, bound)
    total, _ = play(x, bound)
    ever = float((total.max(1) >= math.log(1 / ALPHA)).mean())
    assert ever <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    assert ever > ALPHA / 5, "a promise that is kept by never speaking is no test"


def test_the_negation_a_mean_above_the_bound_is_found() -> None:
    x = (np.random.default_rng(1).random((300, 600)) < 0.65).astype(float)
    total, recent = play(x, 0.5)
    assert (total.max(1) >= math.log(100)).mean() >= 0.99
    assert (recent.max(1) >= math.log(1e4)).mean() >= 0.99


def test_the_detector_waits_as_long_as_it_promises() -> None:
    """No run may end the wait before its first alarm; runs that never raise one count with their length, which is too short."""
    runs, steps = 400, 2000
    x = (np.random.default_rng(2).random((runs, steps)) < 0.3).astype(float)
    hit = play(x, 0.3)[1] >= math.log(EVERY)
    waited = np.where(hit.any(1), hit.argmax(1) + 1, steps)
    assert waited.mean() >= EVERY
    for n in (30, 100, 200):
        share = float((waited <= n).mean())
        assert share <= n / EVERY + 3 * math.sqrt(share / runs)
    assert hit.any(1).mean() > 0.5, "the promise must be near what happens, or the test shows nothing"


def test_a_late_change_is_found_as_fast_as_an_early_one() -> None:
    rng = np.random.default_rng(3)
    quiet = (rng.random((100, 2000)) < 0.2).astype(float)
    loud = (rng.random((100, 400)) < 0.5).astype(float)
    level = math.log(1e6)
    early = (play(loud, 0.3)[1] >= level).argmax(1)
    total, recent = play(np.concatenate([quiet, loud], 1), 0.3)
    assert not (recent[:, :2000] >= level).any()
    late = (recent[:, 2000:] >= level).argmax(1)
    assert 0 < np.median(late) <= np.median(early) + 5
    assert (total[:, -1] < 0).all(), "capital since the start has been spent, which is why there are two"


def test_the_detector_knows_when_it_began() -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.random(500) < 0.2, rng.random(200) < 0.6]).astype(float)
    state = nothing(1)
    for value in x:
        state = state.then(one(np.array([value]), np.array([0.3])))
    assert abs(int(state.since[0, state.best[0].argmax()]) - 500) < 25


def folded(x: Doubles) -> Evidence:
    state = nothing(2)
    for value in x:
        state = state.then(one(value, np.array([0.3, 0.6])))
    return state


@pytest.mark.parametrize("cuts", [(0, 0), (1, 40), (13, 25), (40, 40)])
def test_stretches_are_put_together_exactly(cuts: tuple[int, int]) -> None:
    x = np.random.default_rng(5).random((40, 2))
    whole = folded(x)
    a, b, c = (folded(part) for part in np.split(x, cuts))
    for joined in (a.then(b).then(c), a.then(b.then(c))):
        assert joined.n == whole.n == 40
        for key in ("total", "recent", "best"):
            np.testing.assert_allclose(getattr(joined, key), getattr(whole, key), rtol=1e-12, atol=1e-9)
        np.testing.assert_array_equal(joined.since, whole.since)


def test_the_sums_are_those_of_the_definition() -> None:
    x = np.random.default_rng(6).random(12)
    state = nothing(1)
    for value in x:
        state = state.then(one(np.array([value]), np.array([0.4])))
    factors = np.array([np.exp(one(np.array([value]), np.array([0.4])).total[0]) for value in x])
    starts = np.array([factors[j:].prod(0) for j in range(len(x))])
    np.testing.assert_allclose(np.exp(state.total[0]), starts[0])
    np.testing.assert_allclose(np.exp(state.recent[0]), starts.sum(0))
    np.testing.assert_allclose(np.exp(state.best[0]), starts.max(0))
    np.testing.assert_array_equal(state.since[0], starts.argmax(0))
    assert mean_of(state.total) == pytest.approx(math.log(starts[0].mean()))
    np.testing.assert_allclose(log_mean(state.total[None]), mean_of(state.total))
    assert mean_of(nothing(3).recent) == -math.inf


@pytest.mark.parametrize("mean", [0.0, 0.02, 0.5, 1.0])
def test_an_interval_holds_the_mean_and_is_not_idle(mean: float) -> None:
    rng = np.random.default_rng(7)
    found = np.array([interval((rng.random(300) < mean).astype(float), 0.05) for _ in range(100)])
    missed = (found[:, 0] > mean + 1e-9) | (found[:, 1] < mean - 1e-9)
    assert missed.mean() <= 0.05
    assert np.median(found[:, 1] - found[:, 0]) < (0.25 if mean == 0.5 else 0.1)
    steady = interval(np.clip(0.5 + 0.02 * rng.standard_normal(300), 0, 1), 0.05)
    assert steady[1] - steady[0] < 0.05, "numbers that vary little are known better"
