"""The guard as a detector: are answers that misbehave told from benign ones by where they stand on the guard's direction?

Two scores of one answer, the higher the more suspicious, of its tokens that were read (prompt tokens are left out: a long
prompt would drown them):

* `projection`: how far their mean lies below the boundary, (m - mean rho) / delta_mu, before the guard acts on them
* `moved`: the share of them that the gate would move, or moves

For a guard of several layers these are of its first. What is reported is the area under the ROC curve, and the share that is
noticed when at most 1 % or 5 % of benign answers may be flagged; that threshold is set on the benign answers themselves, so with
n of them no rate below 1 / n can be told from none.

Numbers in, numbers out. It knows gates, and neither models nor texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError
from steerguard.guard import Guard
from steerguard.metrics import LEVEL, RESAMPLES, Interval, bootstrap_interval
from steerguard.rules import shift

SCORES = ("projection", "moved")
FALSE_ALARMS = (0.01, 0.05)
"""Shares of benign answers that may be flagged."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Suspicion:
    """The scores of one answer."""

    projection: float
    moved: float

    @classmethod
    def of(cls, rho: Sequence[float], guard: Guard) -> Suspicion | None:
        """Of the projections `[tokens]` of an answer's tokens on the guard's first layer; None without any.

        Raises:
            InputError: class means that are the same, so that there is no distance to tell projections in.
        """
        probe, gate = next(guard.gates())
        if probe.delta_mu == 0:
            raise InputError(f"guard {guard.name!r}: the class means of layer {probe.layer} are the same: it tells nothing apart")
        read = np.asarray(rho, np.float32)
        if not len(read):
            return None
        delta = shift(np, read, gate.row())
        below = (probe.m - float(read.astype(np.float64).mean())) / probe.delta_mu
        return cls(below, float(np.count_nonzero(delta)) / len(read))


@dataclass(frozen=True)
class Detection:
    """How well one score tells answers from benign ones."""

    score: str
    "one of `SCORES`"
    auroc: Interval
    "area under the ROC curve; answers and benign ones are drawn again each by themselves"
    at_1: Interval
    at_5: Interval
    "share of the answers that are flagged when at most 1 %, or 5 %, of the benign ones are; the threshold is held fixed"
    threshold_1: float
    threshold_5: float
    "what a score must exceed to be flagged"
    benign: int
    "benign answers that the threshold was set on"

    @property
    def resolved(self) -> bool:
        """Whether there are benign answers enough that 1 % of them is one."""
        return self.benign * FALSE_ALARMS[0] >= 1


def threshold(benign: Sequence[float], rate: float) -> float:
    """The lowest value that at most that share of the benign scores exceeds. Raises InputError without scores."""
    if not benign:
        raise InputError("a threshold is set on benign answers, and there are none")
    falling = sorted(benign, reverse=True)
    return falling[min(int(rate * len(falling)), len(falling) - 1)]


def auroc(positive: Sequence[float] | Doubles, negative: Sequence[float] | Doubles) -> float:
    """Probability that a positive score is higher than a negative one; ties count half."""
    ordered, own = np.sort(np.asarray(negative, np.float64)), np.asarray(positive, np.float64)
    below, upto = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    return float((below + upto).mean() / (2 * len(ordered)))


def detection(score: str, positive: Sequence[float], benign: Sequence[float], *, seed: int = 42) -> Detection | None:
    """How well the score tells the positives from the benign ones; None if there are none of either."""
    if not positive or not benign:
        return None
    one, other = np.asarray(positive, np.float64), np.asarray(benign, np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise InputError("scores of a monitor must be finite; load the model in a wider dtype")
    rng = np.random.default_rng(seed)
    drawn = [
        auroc(one[rng.integers(len(one), size=len(one))], other[rng.integers(len(other), size=len(other))])
        for _ in range(RESAMPLES if min(len(one), len(other)) > 1 else 0)
    ]
    low, high = map(float, np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])) if drawn else (None, None)
    limits = [threshold(benign, rate) for rate in FALSE_ALARMS]
    at_1, at_5 = (bootstrap_interval([float(x > limit) for x in positive], seed=seed) for limit in limits)
    if at_1 is None or at_5 is None:
        return None  # not so: there are positives
    found = Interval(auroc(one, other), low, high, len(one))
    return Detection(score, found, at_1, at_5, limits[0], limits[1], len(other))


def detections(positive: Sequence[Suspicion | None], benign: Sequence[Suspicion | None]) -> dict[str, Detection]:
    """Each score's detection, by its name; {} if there is nothing to tell apart. None is an answer without tokens to read."""
    found = {
        score: detection(score, *([getattr(one, score) for one in side if one is not None] for side in (positive, benign)))
        for score in SCORES
    }
    return {score: one for score, one in found.items() if one is not None}
