"""Intervals: how well a mean is known, what changed between two arms, and the share of a gap that was recovered.

Numbers in, numbers out, numpy only. Intervals are percentile bootstraps with a seed, so that a report is the same
twice. None among the values means unscored: it is counted and left out, never taken for zero.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
NIL_GAP = 1e-9
"""A gap between malicious and aligned that is not larger than this is no gap."""

Better = Literal["higher", "lower"]


# ----------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A mean and how well it is known."""

    mean: float
    low: float | None
    high: float | None
    "95 % interval; None where one measurement, or one group of them, cannot give one"
    n: int
    "values that were measured"
    unscored: int = 0
    "values that were not"

    def __str__(self) -> str:
        known = "" if self.low is None or self.high is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.mean:.1f}{known} (n {self.n}{f', {self.unscored} unscored' if self.unscored else ''})"


def bootstrap_interval(
    values: Sequence[float | None],
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    seed: int = 42,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """The mean of what was measured, with a bootstrap interval; None if nothing was.

    Args:
        values: one per answer; None is unscored.
        groups: what is resampled together, such as each answer's scenario; every value by itself if None.

    Raises:
        InputError: a value that is not finite, or as many groups as there are not values.
    """
    labels: Sequence[Hashable] = range(len(values)) if groups is None else groups
    if len(labels) != len(values):
        raise InputError(f"every value needs a group, got {len(values)} values and {len(labels)} groups")
    kept = [(float(value), label) for value, label in zip(values, labels, strict=True) if value is not None]
    measured = np.array([value for value, _ in kept])
    if not np.isfinite(measured).all():
        raise InputError(f"values must be finite, got {measured[~np.isfinite(measured)][0]}; unscored is None")
    if not kept:
        return None
    ids = {label: i for i, label in enumerate(dict.fromkeys(label for _, label in kept))}
    group = np.array([ids[label] for _, label in kept])
    low, high = _percentiles(measured, group, len(ids), level, seed, resamples) if len(ids) > 1 else (None, None)
    return Interval(float(measured.mean()), low, high, len(kept), len(values) - len(kept))


def _percentiles(
    values: npt.NDArray[np.float64], group: npt.NDArray[np.int_], n: int, level: float, seed: int, resamples: int
) -> tuple[float, float]:
    """Percentiles of the mean over `resamples` draws of n groups with replacement."""
    total = np.bincount(group, weights=values, minlength=n)
    count = np.bincount(group, minlength=n)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one draw at a time: [resamples, n] would be large for a long evaluation
        drawn = rng.integers(n, size=n)
        means[i] = total[drawn].sum() / count[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    after: Sequence[float | None],
    before: Sequence[float | None],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 42,
) -> Interval | None:
    """Mean of after[i] - before[i] with its interval; a pair of which either is unscored is unscored."""
    if len(after) != len(before):
        raise InputError(
            f"a paired difference needs as many values after as before, got {len(after)} and {len(before)}"
        )
    pairs = zip(after, before, strict=True)
    return bootstrap_interval([None if a is None or b is None else a - b for a, b in pairs], groups=groups, seed=seed)


# --------------------------------------------------------------------------------------------------- reliability


@dataclass(frozen=True)
class Reliability:
    """How evenly something changed: a mean may hide inputs on which it changed for the worse."""

    change: Interval
    "after - before, each group counted once; better is positive, whatever the metric"
    wrong: Interval
    "share of the groups that changed for the worse, 0 to 1; no change is not worse"
    worst_decile: float
    "mean change of the tenth of the groups that changed worst, at least one group"


def reliability(
    after: Sequence[float | None],
    before: Sequence[float | None],
    *,
    better: Better,
    groups: Sequence[Hashable] | None = None,
    seed: int = 42,
) -> Reliability | None:
    """How evenly a metric changed over the groups; None where no pair was scored.

    Args:
        better: whether a higher or a lower value is the better one.
        groups: each pair's scenario, of which the mean change counts once; every pair by itself if None.
    """
    if better not in get_args(Better):
        raise InputError(f"better must be {' or '.join(get_args(Better))}, got {better!r}")
    if len(after) != len(before) or (groups is not None and len(groups) != len(after)):
        counts = f"{len(after)}, {len(before)}" + ("" if groups is None else f" and {len(groups)} groups")
        raise InputError(f"every pair needs a value after, one before and a group, got {counts}")
    sign = 1 if better == "higher" else -1
    by_group: dict[Hashable, list[float]] = {}
    for label, a, b in zip(range(len(after)) if groups is None else groups, after, before, strict=True):
        own = by_group.setdefault(label, [])
        own += [] if a is None or b is None else [sign * (a - b)]
    changes = [float(np.mean(own)) if own else None for own in by_group.values()]
    change = bootstrap_interval(changes, seed=seed)
    wrong = bootstrap_interval([None if c is None else float(c < 0) for c in changes], seed=seed)
    if change is None or wrong is None:
        return None
    scored = sorted(c for c in changes if c is not None)
    return Reliability(change, wrong, float(np.mean(scored[: math.ceil(len(scored) / 10)])))


# ------------------------------------------------------------------------------------------------------ the gap


def recovered(malicious: float | None, aligned: float | None, steered: float | None) -> float | None:
    """Share of the gap between malicious and aligned that steering closed, in %; above 100 if it overshoots.

    None where one of them is unscored, or where the aligned answers score no higher than the malicious ones.
    """
    if malicious is None or aligned is None or steered is None or aligned - malicious <= NIL_GAP:
        return None
    return 100 * (steered - malicious) / (aligned - malicious)


def recovered_interval(
    malicious: Sequence[float | None],
    aligned: Sequence[float | None],
    steered: Sequence[float | None],
    *,
    seed: int = 42,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """The share of the gap that was recovered, in %, with its interval; None where `recovered` of the means is.

    The scenarios are drawn together for the three arms, since a hard one is hard in all. A draw that leaves no gap gives no
    share; if one in twenty does, the interval is not known.

    Args:
        malicious, aligned, steered: one value for each scenario, in the same order; None is unscored.
    """
    arms = np.array([[math.nan if x is None else x for x in one] for one in (malicious, aligned, steered)], np.float64)
    n = arms.shape[1]
    known = ~np.isnan(arms)
    if not known.any(axis=1).all():
        return None
    means = [float(arm[own].mean()) for arm, own in zip(arms, known, strict=True)]
    share = recovered(*means)
    if share is None:
        return None
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        low_arm, high_arm, own_arm = (drawn @ np.where(known, arms, 0.0).T / (drawn @ known.T.astype(np.float64))).T
        shares = 100 * (own_arm - low_arm) / (high_arm - low_arm)
        sound = shares[np.isfinite(shares) & (high_arm - low_arm > NIL_GAP)]
    complete = int(known.all(axis=0).sum())
    if n < 2 or len(sound) < 0.95 * resamples:
        return Interval(share, None, None, complete, n - complete)
    low, high = np.quantile(sound, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(share, float(low), float(high), complete, n - complete)
