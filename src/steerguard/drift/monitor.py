"""The monitor: has benign traffic moved away from a guard's reference?

"No drift" means: of every request, given those before it, the expected rank and fire lie in the reference's ranges, widened
by a tolerance. Four bounds per steered layer (rank and fire, from above and from below) are bet against (`betting`), all
stakes together. Two alarms follow, each with its own promise, and neither assumes a distribution, a number of tokens, or
when anybody looks:

* `total` looks at all requests since the start: without drift it is ever raised with probability at most `alpha`.
* `recent` looks for a change at any time: without drift it is raised no more often than once in `every` requests on
  average, and within n requests with probability at most n/`every`.

To both comes `reference.ERROR`, the probability that a range misses its mean. An alarm counts when it is raised: evidence may
fall again, so the caller keeps it.

A state has a fixed size, whatever the number of requests, and is a value: `add` gives a new one, `then` puts two together
exactly as if the second's requests had come after the first's. This module knows numbers; it knows no model and no clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from steerguard import files
from steerguard.drift import betting
from steerguard.drift.betting import STAKES, Doubles, Evidence
from steerguard.drift.reference import QUANTILES, STATISTICS, Projections, Reference, check_projections
from steerguard.errors import InputError
from steerguard.files import Malformed, canonical_json

SIDES = ("above", "below")
BINS = 8
"""Bins of the stability index, each with an eighth of the reference's tokens."""
FADING = 1 - 1 / 256
"""Weight of a request in the descriptive figures, against the one that comes after it: about the last 500 count."""
FLOOR = 1e-4
"""A share of tokens below this counts as this in the stability index, which takes its logarithm."""

Side = Literal["misaligned", "aligned"]
Alarm = Literal["total", "recent"]


@dataclass(frozen=True, eq=False)
class DriftState:
    """What a monitor remembers of any number of requests."""

    monitor: str
    "digest of the monitor whose state it is"
    evidence: Evidence
    "of bounds [layers, statistics, sides]"
    shares: Doubles
    "[layers, BINS] faded sums of each request's share of tokens in each bin"
    values: Doubles
    "[layers, statistics] faded sums"
    weight: float
    "faded number of requests"

    @property
    def n(self) -> int:
        "requests"
        return self.evidence.n

    def then(self, later: DriftState) -> DriftState:
        """These requests and then those. Raises InputError for states of different monitors."""
        if self.monitor != later.monitor:
            raise InputError("these states are of monitors with another reference or tolerance; they cannot be put together")
        fade = FADING**later.n
        return DriftState(
            self.monitor, self.evidence.then(later.evidence), fade * self.shares + later.shares,
            fade * self.values + later.values, fade * self.weight + later.weight,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """The state as JSON values."""
        e = self.evidence
        logs = {key: _jsonable(getattr(e, key)) for key in ("total", "recent", "best")}
        return {
            "monitor": self.monitor, "n": e.n, **logs, "since": e.since.tolist(), "shares": self.shares.tolist(),
            "values": self.values.tolist(), "weight": self.weight,
        }  # fmt: skip


@dataclass(frozen=True)
class Drift:
    """What a monitor says of a state."""

    alarm: Alarm | None
    "which alarm is raised, the stricter first; None: no drift is shown"
    n: int
    "requests seen"
    e_value: float
    "evidence since the start; alarm at 1/alpha"
    recent: float
    "evidence of a change at any time; alarm at `every`"
    since: int | None
    "with which request, 0 the first, the change most likely began; None without an alarm"
    side: Side | None
    "where the traffic has moved; None without an alarm"
    layer: int | None
    "steered layer that shows it best; None without an alarm"
    statistic: str | None
    "rank or fire, whichever shows it best; None without an alarm"
    psi: float | None
    "population stability index of the projections of recent requests, the largest over layers; None before the first request"
    fire: float | None
    "share of tokens below the boundary in recent requests, at `layer`, or else at the first; None before the first request"
    fire_reference: float
    "the same in the reference"

    @property
    def drifted(self) -> bool:
        return self.alarm is not None

    def __str__(self) -> str:
        if self.n == 0:
            return "no requests yet"
        seen = f"{self.n} requests, PSI {self.psi:.2f}, {100 * (self.fire or 0):.1f} % of tokens below the boundary"
        seen += f" (reference {100 * self.fire_reference:.1f} %)"
        if self.alarm is None:
            return f"no drift: {seen}"
        where = f"layer {self.layer}, by {self.statistic}"
        return f"drift towards the {self.side} side since about request {self.since} ({where}): {seen}"


@dataclass(frozen=True)
class Monitor:
    """Settings, and what they make of states. Raises InputError for settings that promise nothing."""

    reference: Reference
    alpha: float = 0.01
    "probability that `total` is ever raised without drift"
    every: int = 1_000_000
    "requests between false alarms of `recent`, on average at least"
    tolerance: float = 0.02
    "by how much a mean rank or fire may lie outside the reference's range without being drift, 0 to 1"

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and self.every >= 2 and 0 <= self.tolerance < 1):
            raise InputError(
                f"alpha must be between 0 and 1, every at least 2 and the tolerance at least 0 and below 1, got {self.alpha}, "
                f"{self.every} and {self.tolerance}"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what a state depends on; alpha and every only judge it."""
        content = [self.reference.digest, self.tolerance, list(STAKES), FADING]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def start(self) -> DriftState:
        """The state of no requests."""
        layers = len(self.reference.layers)
        return DriftState(
            self.digest, betting.nothing(layers, len(STATISTICS), len(SIDES)), np.zeros((layers, BINS)),
            np.zeros((layers, len(STATISTICS))), 0.0,
        )  # fmt: skip

    def add(self, state: DriftState, request: Projections) -> DriftState:
        """The state with one more request. Raises InputError for projections that are not of such a guard."""
        return state.then(self.of_request(request))

    def of_request(self, request: Projections) -> DriftState:
        """The state of one request."""
        values = self.reference.statistics(request)
        return DriftState(self.digest, self.evidence(values), self._shares(request), values, 1.0)

    def evidence(self, values: Doubles) -> Evidence:
        """The evidence of one request's statistics `[..., layers, 2]`, against its four bounds per layer."""
        return betting.one(np.stack([values, 1 - values], -1), self.bounds)

    @cached_property
    def bounds(self) -> Doubles:
        """`[layers, statistics, sides]`: what mean x, and mean 1 - x, may be at most without drift."""
        ranges = [[getattr(layer, key) for key in STATISTICS] for layer in self.reference.layers]
        most = [[(one.high + self.tolerance, 1 - one.low + self.tolerance) for one in row] for row in ranges]
        return np.minimum(np.array(most), 1.0)

    def verdict(self, state: DriftState) -> Drift:
        """Whether a state shows drift, and what kind. Raises InputError for another monitor's state."""
        if state.monitor != self.digest:
            raise InputError("this state is of a monitor with another reference or tolerance; start a new one")
        e = state.evidence
        total, recent = betting.mean_of(e.total), betting.mean_of(e.recent)
        alarm: Alarm | None = None
        if total >= -math.log(self.alpha):
            alarm = "total"
        elif recent >= math.log(self.every):
            alarm = "recent"
        at, since, side, statistic = 0, None, None, None
        if alarm is not None:
            at, which, way, _ = index = tuple(map(int, np.unravel_index(int(e.best.argmax()), e.best.shape)))
            since, statistic, side = int(e.since[index]), STATISTICS[which], _side(STATISTICS[which], SIDES[way])
        layer = self.reference.layers[at]
        return Drift(
            alarm=alarm, n=e.n, e_value=_exp(total), recent=_exp(recent), since=since, side=side,
            layer=None if alarm is None else layer.layer, statistic=statistic, psi=self._psi(state),
            fire=float(state.values[at, STATISTICS.index("fire")] / state.weight) if e.n else None,
            fire_reference=layer.fire.mean,
        )  # fmt: skip

    def read(self, record: object) -> DriftState:
        """A state as `DriftState.record` wrote it. Raises InputError for anything else, or another monitor's."""
        try:
            return self._read(record)
        except Malformed as error:
            raise InputError(f"this is no state of this monitor: {error}; start a new one") from error

    # -------------------------------------------------------------------------------------------------- inside

    def _shares(self, request: Projections) -> Doubles:
        """`[layers, BINS]` share of the request's tokens in each bin."""
        rows = check_projections(request, len(self.reference.layers))
        found = []
        for layer, rho in zip(self.reference.layers, rows, strict=True):
            inner = layer.quantiles[:: QUANTILES // BINS][1:-1]
            found.append(np.bincount(np.searchsorted(inner, rho, side="right"), minlength=BINS) / len(rho))
        return np.array(found)

    def _psi(self, state: DriftState) -> float | None:
        if not state.n:
            return None
        now = np.maximum(state.shares / state.weight, FLOOR)
        return float(((now - 1 / BINS) * np.log(now * BINS)).sum(-1).max())

    def _read(self, record: object) -> DriftState:
        found = files.take(record, "a state", _STATE)
        if found["monitor"] != self.digest:
            raise Malformed("it is of a monitor with another reference or tolerance")
        empty = self.start()
        shape = empty.evidence.total.shape
        logs = {key: _array(found, key, shape) for key in ("total", "recent", "best")}
        since = _array(found, "since", shape).astype(np.int64)
        if found["n"] < 0 or found["weight"] < 0 or (since < 0).any() or (since > found["n"]).any():
            raise Malformed("its counts are not those of a number of requests")
        return DriftState(
            found["monitor"], Evidence(found["n"], logs["total"], logs["recent"], logs["best"], since),
            _array(found, "shares", empty.shares.shape), _array(found, "values", empty.values.shape), float(found["weight"]),
        )  # fmt: skip


_STATE: dict[str, files.Kind] = {
    "monitor": str, "n": int, "total": list, "recent": list, "best": list, "since": list, "shares": list, "values": list,
    "weight": float,
}  # fmt: skip


def _side(statistic: str, way: str) -> Side:
    """Low ranks and much fire are on the misaligned side of what was."""
    return "misaligned" if (statistic == "fire") == (way == "above") else "aligned"


def _exp(log: float) -> float:
    """exp, held to the largest number that JSON can carry with ease."""
    return math.exp(min(log, 690.0))


def _jsonable(logs: Doubles) -> Any:
    """Nested lists; JSON has no -inf, so it is null."""
    return np.where(np.isneginf(logs), None, logs).tolist()  # type: ignore[call-overload]


def _array(found: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Doubles:
    """Numbers of that shape, null for -inf. Raises Malformed."""
    try:
        rows = np.array(found[key], dtype=object)
        numbers = np.array([-np.inf if x is None else x for x in rows.reshape(-1)], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise Malformed(f"{key!r} must be numbers {list(shape)}") from error
    if rows.shape != shape or np.isnan(numbers).any() or np.isposinf(numbers).any():
        raise Malformed(f"{key!r} must be numbers {list(shape)}, got {list(rows.shape)}")
    return numbers.reshape(shape)
