"""What evaluations give: figures of two arms on the same cases, and any result as JSON values.

Numbers in, frozen values out. It knows no benchmark.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from steerguard.errors import InputError
from steerguard.metrics import Interval, bootstrap_interval, paired_difference

ARMS = ("unguarded", "guarded")


class Named(Protocol):
    """Whatever has a name of its own among others."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def by_name(found: Sequence[N], name: str, what: str) -> N:
    """The one of that name. Raises InputError, naming what there is."""
    for one in found:
        if one.name == name:
            return one
    raise InputError(f"there is no {what} {name!r}; there are {', '.join(one.name for one in found)}")


@dataclass(frozen=True)
class Paired:
    """One figure of both arms on the same cases; None where nothing was scored."""

    unguarded: Interval | None
    guarded: Interval | None
    change: Interval | None
    "guarded - unguarded, case by case"

    @classmethod
    def of(
        cls,
        unguarded: Sequence[float | None],
        guarded: Sequence[float | None],
        *,
        groups: Sequence[Hashable] | None = None,
        seed: int = 42,
    ) -> Paired:
        """Both arms' means and their difference; `groups` as in `bootstrap_interval`."""
        return cls(
            bootstrap_interval(unguarded, groups=groups, seed=seed),
            bootstrap_interval(guarded, groups=groups, seed=seed),
            paired_difference(guarded, unguarded, groups=groups, seed=seed),
        )

    def __str__(self) -> str:
        return f"unguarded {figure(self.unguarded)}, guarded {figure(self.guarded)}, change {figure(self.change)}"


def figure(found: Interval | None) -> str:
    """An interval to three significant digits; `unscored` for None."""
    if found is None:
        return "unscored"
    known = "" if found.low is None or found.high is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.mean:.3g}{known} (n {found.n}{f', {found.unscored} unscored' if found.unscored else ''})"


def as_json(value: Any) -> Any:
    """A result as JSON values: dataclasses and mappings as objects, tuples as lists.

    Raises:
        InputError: something that JSON cannot hold.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | np.floating | np.integer):
        return value if isinstance(value, float) else value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [as_json(one) for one in value]
    raise InputError(f"a {type(value).__name__} cannot be written as JSON")
