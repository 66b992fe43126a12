"""Measured: what several arms measured on the same cases, case by case.

A case is an answer to a scenario, or a benign prompt. Values are kept one by one, so that arms can be paired, and means
come with intervals that know which cases belong together. It knows neither models nor what a metric means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from steerguard.errors import InputError
from steerguard.metrics.intervals import Better, Interval, Reliability, bootstrap_interval, paired_difference, reliability

Values = tuple[float | None, ...]
"""One value for each case; None is unscored."""


@dataclass(frozen=True)
class Measured:
    """One value for every arm, metric and case. Raises InputError for a value that is not finite, or one too few."""

    values: Mapping[str, Mapping[str, Values]]
    "arm -> metric -> one value for each case, the same cases in every arm; None is unscored"
    groups: tuple[Hashable, ...]
    "of each case, what is resampled with it: its scenario or prompt"
    baseline: str | None = None
    "the arm that others are compared with; None where there is none"

    def __post_init__(self) -> None:
        for arm, metrics in self.values.items():
            for metric, values in metrics.items():
                if len(values) != len(self.groups):
                    raise InputError(f"{arm}, {metric}: every case needs a value, got {len(values)} for {len(self.groups)}")
                broken = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
                if broken:
                    raise InputError(
                        f"{arm}, {metric}: values must be finite, got {values[broken[0]]} for {self.groups[broken[0]]!r}; "
                        "unscored is None"
                    )
        if self.baseline is not None and self.baseline not in self.values:
            raise InputError(f"the baseline must be one of the arms {', '.join(self.values)}, got {self.baseline!r}")
        frozen = {arm: MappingProxyType({k: tuple(v) for k, v in metrics.items()}) for arm, metrics in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(frozen))
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms by name."""
        return tuple(self.values)

    def of(self, arm: str, metric: str) -> Values:
        """One arm's values of one metric, case by case. Raises InputError, naming what there is."""
        for kind, name, known in (("arm", arm, self.values), ("metric", metric, self.values.get(arm, {}))):
            if name not in known:
                raise InputError(f"there is no {kind} {name!r}; there are {', '.join(known) or 'none'}")
        return self.values[arm][metric]

    def interval(self, arm: str, metric: str, *, seed: int = 42) -> Interval | None:
        """The mean of one arm's metric, resampled by group; None if nothing was scored."""
        return bootstrap_interval(self.of(arm, metric), groups=self.groups, seed=seed)

    def difference(self, arm: str, metric: str, *, to: str | None = None, seed: int = 42) -> Interval | None:
        """Mean of an arm's values less another's, case by case.

        Args:
            to: the other arm, by default the baseline.
        """
        return paired_difference(self.of(arm, metric), self.of(self._other(to), metric), groups=self.groups, seed=seed)

    def reliability(self, arm: str, metric: str, *, better: Better, to: str | None = None, seed: int = 42) -> Reliability | None:
        """How evenly an arm differs from another (the baseline) over the groups; see `intervals.reliability`."""
        before = self.of(self._other(to), metric)
        return reliability(self.of(arm, metric), before, groups=self.groups, better=better, seed=seed)

    def intervals(self, *, seed: int = 42) -> dict[str, dict[str, Interval | None]]:
        """arm -> metric -> `interval`."""
        return {arm: {metric: self.interval(arm, metric, seed=seed) for metric in own} for arm, own in self.values.items()}

    def _other(self, to: str | None) -> str:
        other = self.baseline if to is None else to
        if other is None:
            raise InputError(f"there is no baseline to compare with; say which arm with `to`: {', '.join(self.values)}")
        return other
