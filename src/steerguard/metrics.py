"""Metrics: repetition, intervals, and the share of a gap that was recovered. Numbers and texts in, numbers out.

numpy only. Intervals are percentile bootstraps with a seed, so that a report is the same twice. None among the values
means unscored: it is counted and left out, never taken for zero.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
NIL_GAP = 1e-9
"""A gap between malicious and aligned that is not larger than this is no gap."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


# ---------------------------------------------------------------------------------------------------- repetition


def words(text: str) -> list[str]:
    """A text's words for counting repetition: NFKC, case folded, punctuation and underscores dropped, apostrophes kept.

    Scripts that put no space between words come out as one word to a run.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that occurred in it before, 0 to 1. A text of fewer than n words repeats none.

    Source: arXiv 2604.08169, repetition within a turn (n = 4).
    """
    if n < 1:
        raise InputError(f"n-grams have at least one word, got n = {n}")
    said = words(text)
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


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


# ------------------------------------------------------------------------------------------------------ the gap


def recovered(malicious: float | None, aligned: float | None, steered: float | None) -> float | None:
    """Share of the gap between malicious and aligned that steering closed, in %; above 100 if it overshoots.

    None where one of them is unscored, or where the aligned answers score no higher than the malicious ones.
    """
    if malicious is None or aligned is None or steered is None or aligned - malicious <= NIL_GAP:
        return None
    return 100 * (steered - malicious) / (aligned - malicious)
