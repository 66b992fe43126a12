"""Agreement: how far raters of the same answers say the same. Numbers in, numbers out.

Krippendorff's alpha for intervals, through evalica: 1 is agreement, 0 what chance would give, below 0 worse than that. It
bears missing ratings and any number of raters. Beside it stand two plain figures that need no theory: by how many points
two raters differ on average, and how far they rank alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from steerguard.errors import InputError, JudgeError


@dataclass(frozen=True)
class Agreement:
    """How far raters agree."""

    alpha: float | None
    "Krippendorff's alpha for intervals; None if no answer has two ratings, or all ratings are one number"
    difference: float | None
    "mean absolute difference of two raters on one answer, in points"
    rank: float | None
    "Spearman's correlation, the mean over pairs of raters; None if a rater gives everything the same"
    raters: tuple[str, ...]
    n: int
    "answers that two raters or more have rated"

    def __str__(self) -> str:
        if self.difference is None:
            return f"agreement unknown: no answer was rated by two of {', '.join(self.raters) or 'nobody'}"
        alpha = "unknown (all ratings are one number)" if self.alpha is None else f"{self.alpha:.2f}"
        rank = "" if self.rank is None else f", rank correlation {self.rank:.2f}"
        return f"alpha {alpha}, {self.difference:.1f} points apart on average{rank} ({len(self.raters)} raters, n {self.n})"


def agreement(ratings: Mapping[str, Sequence[float | None]]) -> Agreement:
    """Agreement of raters, each with one rating to an answer, all in one order; None where a rater has none.

    Raises:
        InputError: raters of different numbers of answers.
    """
    if len({len(values) for values in ratings.values()}) > 1:
        raise InputError(f"every rater needs one rating to an answer, got {[len(values) for values in ratings.values()]}")
    rows = np.array([[np.nan if v is None else v for v in values] for values in ratings.values()], dtype=float)
    rows = rows.reshape(len(ratings), len(next(iter(ratings.values()), ())))
    shared = (~np.isnan(rows)).sum(axis=0) >= 2
    raters, n = tuple(ratings), int(shared.sum())
    if not n:
        return Agreement(None, None, None, raters, 0)
    rows = rows[:, shared]
    pairs = [rows[:, ~np.isnan(rows[[i, j]]).any(axis=0)][[i, j]] for i, j in combinations(range(len(rows)), 2)]
    apart = np.concatenate([np.abs(a - b) for a, b in pairs])
    ranks = [r for a, b in pairs if (r := _spearman(a, b)) is not None]
    return Agreement(_alpha(rows), float(apart.mean()), float(np.mean(ranks)) if ranks else None, raters, n)


def _alpha(rows: np.ndarray) -> float | None:
    """Krippendorff's alpha of [raters, answers]; a tenth of a point is the finest that is told apart."""
    if np.nanmax(rows) == np.nanmin(rows):
        return None
    try:
        import evalica
        import pandas
    except ImportError as error:
        raise JudgeError(f'agreement needs evalica, and {error.name} is not there; pip install "steerguard[judge]"') from error
    return float(evalica.alpha(pandas.DataFrame(np.round(rows, 1)), distance="interval").alpha)


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
