"""The monitor on simulated traffic: silent without drift, at its stated rate; prompt with it; the same however it is split."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import traffic
from traffic import TOKEN_SIGMA, TOKENS, guard, reference, requests, statistics, watch

from steerguard.drift import DriftState, Monitor, Reference
from steerguard.drift.betting import nothing
from steerguard.drift.monitor import BINS
from steerguard.drift.reference import MIN_REQUESTS
from steerguard.errors import InputError

LOUD = (math.log(100), math.log(1e6))
"""log thresholds of a monitor's defaults."""


def first(evidence: traffic.Doubles, level: float) -> traffic.Doubles:
    """Requests until the alarm, inf where there is none."""
    hit = evidence >= level
    return np.where(hit.any(1), hit.argmax(1) + 1, np.inf)


# ------------------------------------------------------------------------------------------------- false alarms


def test_no_drift_no_alarm_whatever_the_reference() -> None:
    """Thirty references of their own, ten long runs each, no tolerance: all of the promise, the reference's luck included."""
    alarms = []
    for seed in range(30):
        own = reference(seed, 300)
        values = statistics(own, requests(np.random.default_rng([8, seed]), 10, 800))
        total, recent = watch(Monitor(own, tolerance=0.0), values)
        alarms += [(total.max(1) >= LOUD[0]) | (recent.max(1) >= LOUD[1])]
    assert np.concatenate(alarms).mean() <= 0.011  # alpha and the reference's error; what `recent` adds is far less


def test_the_promise_holds_at_the_very_edge_of_no_drift() -> None:
    """Traffic whose mean rank is exactly the most that is no drift; alpha a tenth, so that the rate can be seen."""
    monitor = Monitor(reference(0), alpha=0.1, tolerance=0.0)
    edge = float(monitor.bounds[0, 0, 0])
    rng = np.random.default_rng(9)
    rank = np.clip(rng.beta(4, 4, (300, 600)) - 0.5 + edge, 0, 1)
    rank += edge - rank.mean()
    fire = np.full_like(rank, monitor.reference.layers[0].fire.mean)
    total, _ = watch(monitor, np.stack([rank, fire], -1)[:, :, None, :])
    assert (total.max(1) >= math.log(10)).mean() <= 0.1


def test_a_token_is_no_observation() -> None:
    """The negation: the same traffic with every token taken for a request raises alarms, because tokens are alike."""
    rng = np.random.default_rng(10)
    false = {"requests": 0.0, "tokens": 0.0}
    for seed in range(5):
        known = requests(np.random.default_rng([7, seed]), 300)
        rho = requests(rng, 20, 200)
        for kind in false:
            as_tokens = kind == "tokens"
            rows = known.reshape(-1, 1) if as_tokens else known
            own = Reference.of_requests(guard(), [[row] for row in rows], seed=seed)
            seen = rho.reshape(20, -1, 1) if as_tokens else rho
            total, _ = watch(Monitor(own, tolerance=0.0), statistics(own, seen))
            false[kind] += float((total.max(1) >= LOUD[0]).mean()) / 5
    assert false["requests"] <= 0.011
    assert false["tokens"] > 0.2, "the tokens of one answer would have to be independent for this to be quiet"


# ------------------------------------------------------------------------------------------------- true alarms

FOUND = {-2.0: 30, -1.0: 80, -0.75: 150, 0.75: 150, 1.0: 90, 2.0: 50}
"""Shift of every token in standard deviations of a token -> requests within which nine in ten runs raise `total`."""


@pytest.mark.parametrize("shift", FOUND)
def test_a_planted_drift_is_found(shift: float) -> None:
    """Half of a token's variance is its request's: these are hard cases. Five references of 500 requests."""
    waited, later = [], []
    for seed in range(5):
        own = reference(seed)
        rng = np.random.default_rng([11, seed])
        moved = requests(rng, 20, 3 * FOUND[shift], shift=shift * TOKEN_SIGMA)
        total, recent = watch(Monitor(own), statistics(own, moved))
        waited += list(first(total, LOUD[0]))
        later += list(first(recent, LOUD[1]))
    assert np.quantile(waited, 0.9) <= FOUND[shift]
    assert np.quantile(later, 0.9) <= 2.5 * FOUND[shift]


def test_more_fire_alone_is_found() -> None:
    """One request in ten is suddenly deep on the wrong side: hardly any change of the mean rank."""
    own = reference(0)
    rng = np.random.default_rng(12)
    rho = requests(rng, 50, 800)
    rho[rng.random((50, 800)) < 0.15] -= 6
    total, _ = watch(Monitor(own), statistics(own, rho))
    assert np.quantile(first(total, LOUD[0]), 0.9) <= 400


def run(monitor: Monitor, rho: traffic.Doubles) -> DriftState:
    state = monitor.start()
    for row in rho:
        state = monitor.add(state, [row])
    return state


@pytest.mark.parametrize(("shift", "side"), [(-1.2, "misaligned"), (1.2, "aligned")])
def test_a_late_drift_says_since_when_and_whereto(shift: float, side: str) -> None:
    monitor = Monitor(reference(0))
    rng = np.random.default_rng(13)
    before = run(monitor, requests(rng, 600))
    assert not monitor.verdict(before).drifted
    assert monitor.verdict(before).psi == pytest.approx(0, abs=0.1)
    state = before
    for row in requests(rng, 300, shift=shift * TOKEN_SIGMA):
        state = monitor.add(state, [row])
        if monitor.verdict(state).drifted:
            break
    found = monitor.verdict(state)
    assert (found.alarm, found.side, found.layer) == ("recent", side, 1)
    assert state.n < 600 + 150
    assert found.since == pytest.approx(600, abs=30)
    assert f"towards the {side} side since about request {found.since}" in str(found)
    after = monitor.verdict(run(monitor, requests(rng, 500, shift=shift * TOKEN_SIGMA)))
    assert after.alarm == "total"
    assert after.psi is not None and after.psi > 0.25
    assert after.fire is not None and (after.fire > after.fire_reference) == (side == "misaligned")


# ------------------------------------------------------------------------------------------------- states


def same(a: DriftState, b: DriftState) -> None:
    assert (a.n, a.monitor) == (b.n, b.monitor)
    assert a.weight == pytest.approx(b.weight)
    for x, y in ((a.shares, b.shares), (a.values, b.values), *((getattr(a.evidence, k), getattr(b.evidence, k)) for k in LOGS)):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(a.evidence.since, b.evidence.since)


LOGS = ("total", "recent", "best")


def test_workers_put_together_are_one_that_saw_it_all() -> None:
    monitor = Monitor(reference(0))
    rho = requests(np.random.default_rng(14), 90, shift=-1.5)
    whole = run(monitor, rho)
    parts = [run(monitor, part) for part in np.split(rho, [20, 20, 55])]
    joined = parts[0].then(parts[1]).then(parts[2]).then(parts[3])
    same(joined, whole)
    same(parts[0].then(parts[1].then(parts[2].then(parts[3]))), whole)
    assert monitor.verdict(joined).alarm == monitor.verdict(whole).alarm == "total"


def test_what_tests_use_in_bulk_is_what_the_monitor_does() -> None:
    monitor = Monitor(reference(0))
    rho = requests(np.random.default_rng(15), 1, 30)
    state = nothing(1, *monitor.bounds.shape)
    for t in range(30):
        state = state.then(monitor.evidence(statistics(monitor.reference, rho)[:, t]))
    one_by_one = run(monitor, rho[0])
    np.testing.assert_allclose(state.total[0], one_by_one.evidence.total)
    total, recent = watch(monitor, statistics(monitor.reference, rho))
    found = monitor.verdict(one_by_one)
    assert (math.exp(total[0, -1]), math.exp(recent[0, -1])) == pytest.approx((found.e_value, found.recent))


def test_a_state_has_a_fixed_size_and_survives_json() -> None:
    monitor = Monitor(reference(0))
    sizes = []
    for n in (0, 1, 400):
        state = run(monitor, requests(np.random.default_rng(16), n))
        text = json.dumps(state.record(), allow_nan=False)
        same(monitor.read(json.loads(text)), state)
        sizes.append(sum(a.nbytes for a in (state.evidence.total, state.evidence.since, state.shares, state.values)))
    assert len(set(sizes)) == 1
    assert str(monitor.verdict(monitor.start())) == "no requests yet"
    assert monitor.verdict(monitor.start()).psi is None


def test_states_that_do_not_belong_are_refused() -> None:
    monitor, other = Monitor(reference(0)), Monitor(reference(1))
    state = monitor.add(monitor.start(), [np.zeros(3)])
    with pytest.raises(InputError, match="another reference"):
        other.verdict(state)
    with pytest.raises(InputError, match="cannot be put together"):
        state.then(other.start())
    with pytest.raises(InputError, match="another reference"):
        other.read(state.record())
    sound = state.record()
    for change in ({"n": -1}, {"total": [[1]]}, {"recent": "x"}, {"weight": "1"}, {"since": [[[[7]]]]}, {"more": 1},
                   {"best": [[["a"]]]}, {"values": [[math.nan, 1]]}):  # fmt: skip
        with pytest.raises(InputError, match="no state of this monitor"):
            monitor.read(sound | change)
    with pytest.raises(InputError, match="no state of this monitor"):
        monitor.read("state")
    stricter = replace(monitor, alpha=0.5, every=10)
    assert stricter.verdict(state).n == 1, "a threshold only judges a state"
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"every": 1}, {"tolerance": 1.0}, {"tolerance": -0.1}):
        with pytest.raises(InputError, match="alpha must be"):
            Monitor(reference(0), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "request_", [[], [np.zeros(0)], [np.zeros((2, 2))], [np.zeros(2), np.zeros(2)], [np.array([1.0, np.nan])]], ids=str
)
def test_projections_that_cannot_be_are_refused(request_: Any) -> None:
    monitor = Monitor(reference(0))
    with pytest.raises(InputError, match="projections"):
        monitor.add(monitor.start(), request_)


# ------------------------------------------------------------------------------------------------- references


def test_a_reference_says_where_its_requests_stand() -> None:
    own = reference(0, 400)
    layer = own.layers[0]
    assert own.n == 400
    assert np.all(np.diff(layer.quantiles) >= 0)
    assert layer.rank.low < 0.5 < layer.rank.high
    assert layer.fire.low < float(np.mean(requests(np.random.default_rng(0), 20000) < -1.5)) < layer.fire.high
    wide = reference(0, MIN_REQUESTS).layers[0]
    assert wide.rank.high - wide.rank.low > 2 * (layer.rank.high - layer.rank.low), "few requests are known badly, and say so"
    shares = np.mean([Monitor(own).of_request([rho]).shares[0] for rho in requests(np.random.default_rng(1), 3000)], 0)
    np.testing.assert_allclose(shares, 1 / BINS, atol=0.06)
    assert Monitor(own).of_request([np.full(TOKENS, -99.0)]).values.tolist() == [[0.0, 1.0]]
    with pytest.raises(InputError, match="at least 20"):
        reference(0, MIN_REQUESTS - 1)


def test_long_requests_weigh_no_more_than_short_ones() -> None:
    rng = np.random.default_rng(17)
    rows = [[np.full(2000, 5.0) + rng.normal(size=2000)] if i % 10 == 0 else [rng.normal(size=3)] for i in range(200)]
    quantiles = Reference.of_requests(guard(), rows).layers[0].quantiles
    assert quantiles[48] < 3 < quantiles[-2]


def test_a_guard_carries_its_reference_and_keeps_its_digest(tmp_path: Any) -> None:
    own = reference(0)
    assert Reference.of_guard(guard()) is None
    carrying = own.on(guard())
    assert carrying.digest == guard().digest
    carrying.save(tmp_path / "g.guard")
    back = Reference.of_guard(type(carrying).load(tmp_path / "g.guard"))
    assert back == own
    assert back is not None and Monitor(back).digest == Monitor(own).digest
    with pytest.raises(InputError, match="other layers, directions or boundaries"):
        own.on(guard(-1.0))
    moved = replace(carrying, probes=guard(-1.0).probes)
    with pytest.raises(InputError, match="take it again"):
        Reference.of_guard(moved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2), ("n", 3), ("layers", [1]), ("acting", 1), ("more", 1), ("quantiles", [2.0, 1.0]), ("quantiles", ["a"]),
        ("rank", {"mean": 0.5, "low": 0.6, "high": 0.7}), ("fire", {"mean": 2, "low": 0, "high": 3}),
    ],
)  # fmt: skip
def test_a_damaged_reference_is_one_sentence(key: str, value: object) -> None:
    record = json.loads(json.dumps(reference(0).record()))
    of = record["layers"][0] if key in ("quantiles", "rank", "fire") else record
    of[key] = value
    with pytest.raises(InputError, match=r"guard 'tiny': .*reference.*take its reference again"):
        Reference.of_guard(replace(guard(), provenance={"reference": record}))
