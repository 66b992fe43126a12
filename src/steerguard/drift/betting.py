"""Betting against "nothing changed": evidence about the mean of a bounded number, at a stated rate of false alarms.

Somebody who doubts that the mean of x in [0, 1] is at most u stakes a share k of what they own on every x, at fair odds or
worse: their capital is multiplied by 1 - k + k x / u. If the mean of each x, given those before it, is at most u, no such
factor is above 1 on average, whatever else is true of x. So, without any other assumption:

* `total`, the capital since the first x, starts at 1 and exceeds 1/alpha with probability at most alpha, ever (Ville).
* `recent`, the sum of the capitals of one new gambler for every x, grows by at most 1 a step on average. The mean number
  of steps until it exceeds N is at least N, and it exceeds N within n steps with probability at most n/N (Shiryaev and
  Roberts). It forgets nothing that is bad for it, and so finds a change that comes late as fast as one that comes early.

Nobody knows the best k, so gamblers with several of them share the stake: the mean of their capitals keeps both guarantees.

Each is a function of the x in their order, and what one stretch of them does to the capital of those before is a product
and a sum: two stretches are put together exactly (`then`), so a state has a fixed size and workers can be merged.

This module knows numbers only. Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", 2024; Shin, Ramdas and Rinaldo, "E-detectors", 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STAKES = np.geomspace(0.02, 0.98, 10)
"""Shares k of the capital that the gamblers stake; the small ones find small changes, the large ones are quick."""
SMALLEST = 1e-3
"""Bounds u below this are taken as this, which only makes an alarm rarer."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a stretch of numbers says against bounds, for any shape `[...]` of bounds and every stake."""

    n: int
    "numbers seen for each bound"
    total: Doubles
    "[..., stakes] log capital of who began with the first number"
    recent: Doubles
    "[..., stakes] log of the summed capitals of one gambler for every number; -inf before the first"
    best: Doubles
    "[..., stakes] log of the largest of those"
    since: Ints
    "[..., stakes] with which number, 0 the first, that gambler began"

    def then(self, later: Evidence) -> Evidence:
        """This stretch and then that one: exactly what going through all numbers in that order gives."""
        carried = self.best + later.total
        older = carried >= later.best
        return Evidence(
            self.n + later.n,
            self.total + later.total,
            np.logaddexp(self.recent + later.total, later.recent),
            np.where(older, carried, later.best),
            np.where(older, self.since, self.n + later.since),
        )

    def capital(self) -> Any:
        """log `[...]` of the mean capital since the first number, over stakes."""
        return _log_mean(self.total)

    def detector(self) -> Any:
        """log `[...]` of the mean summed capital, over stakes; -inf before the first number."""
        return _log_mean(self.recent)


def nothing(*shape: int) -> Evidence:
    """The evidence of no numbers, about bounds of that shape."""
    full = (*shape, len(STAKES))
    return Evidence(0, np.zeros(full), np.full(full, -np.inf), np.full(full, -np.inf), np.zeros(full, np.int64))


def one(x: Doubles, bound: Doubles) -> Evidence:
    """The evidence of one number `[...]`, each in [0, 1], against "the mean is at most `bound`" `[...]`."""
    ratio = np.clip(x, 0, 1) / np.maximum(bound, SMALLEST)
    log = np.log1p(STAKES * (ratio[..., None] - 1))
    return Evidence(1, log, log, log, np.zeros(log.shape, np.int64))


def mean_of(evidence: Doubles) -> float:
    """log of the mean of what `evidence`, logs of any shape, stands for; -inf of -infs."""
    return float(_log_mean(evidence.reshape(-1)))


def interval(x: Doubles, error: float) -> tuple[float, float]:
    """A range that misses the mean of independent numbers `[n]` in [0, 1] with probability at most `error`, for any n."""
    return _at_least(x, error / 2), 1 - _at_least(1 - x, error / 2)


def _at_least(x: Doubles, error: float) -> float:
    """The largest bound that the numbers refute at that error: capital against it falls as the bound grows."""
    low, high, needed = 0.0, 1.0, -math.log(error)
    for _ in range(40):
        middle = (low + high) / 2
        capital = np.log1p(STAKES * (x[:, None] / middle - 1)).sum(0)
        low, high = (middle, high) if float(_log_mean(capital)) >= needed else (low, middle)
    return low


def _log_mean(logs: Doubles) -> Any:
    """log of the mean over the last axis; -inf where all are."""
    top = logs.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logs - safe).mean(-1)) + safe[..., 0]
