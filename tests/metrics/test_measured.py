"""Measured: arms are paired case by case, groups stay together, and what is no number is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from steerguard.errors import InputError
from steerguard.metrics import Measured, bootstrap_interval, paired_difference

GROUPS = ("a", "a", "b", "b", "c", "c")
VALUES: dict[str, dict[str, Any]] = {
    "aligned": {"x": (1.0, 2.0, 3.0, 4.0, None, 6.0)},
    "guarded": {"x": (2.0, 3.0, 2.0, 6.0, 5.0, None)},
}
FOUND = Measured(VALUES, GROUPS, "aligned")


def test_intervals_know_the_groups() -> None:
    values = VALUES["guarded"]["x"]
    assert FOUND.interval("guarded", "x") == bootstrap_interval(values, groups=GROUPS)
    assert FOUND.interval("guarded", "x") != bootstrap_interval(values)
    assert FOUND.intervals()["aligned"]["x"] == FOUND.interval("aligned", "x")
    assert FOUND.arms == ("aligned", "guarded")


def test_differences_are_paired() -> None:
    due = paired_difference(VALUES["guarded"]["x"], VALUES["aligned"]["x"], groups=GROUPS)
    assert due is not None and (due.n, due.unscored, due.mean) == (4, 2, 0.75)
    assert FOUND.difference("guarded", "x") == FOUND.difference("guarded", "x", to="aligned") == due
    even = FOUND.reliability("guarded", "x", better="higher")
    assert even is not None and (even.change.n, even.change.unscored, even.worst_decile) == (2, 1, 0.5)
    alone = Measured(VALUES, GROUPS)
    with pytest.raises(InputError, match="say which arm with `to`: aligned, guarded"):
        alone.difference("guarded", "x")
    assert alone.difference("guarded", "x", to="aligned") == due


def test_values_cannot_be_changed() -> None:
    own = {"aligned": {"x": (1.0,)}}
    found = Measured(own, ("a",))
    own["aligned"]["x"] = (2.0,)
    assert found.of("aligned", "x") == (1.0,)
    with pytest.raises(TypeError):
        found.values["aligned"]["x"] = (3.0,)  # type: ignore[index]


def test_what_cannot_be_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match=r"aligned, x: values must be finite, got .* for 'b'"):
            Measured({"aligned": {"x": (1.0, bad)}}, ("a", "b"))
    with pytest.raises(InputError, match="aligned, x: every case needs a value, got 1 for 2"):
        Measured({"aligned": {"x": (1.0,)}}, ("a", "b"))
    with pytest.raises(InputError, match="must be one of the arms aligned, guarded, got 'none'"):
        Measured(VALUES, GROUPS, "none")
    with pytest.raises(InputError, match="no arm 'steered'; there are aligned, guarded"):
        FOUND.interval("steered", "x")
    with pytest.raises(InputError, match="no metric 'y'; there are x"):
        FOUND.interval("guarded", "y")
