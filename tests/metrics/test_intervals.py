"""Intervals: against theory, and for what was not measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from steerguard.errors import InputError
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered, recovered_interval, reliability

# ----------------------------------------------------------------------------------------------------- intervals


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(50, 10, size=400)
    found = bootstrap_interval(list(values))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [bootstrap_interval(list(rng.normal(size=40)), resamples=200) for _ in range(200)]
    hit = np.mean([i is not None and i.low is not None and i.high is not None and i.low <= 0 <= i.high for i in found])
    assert 0.88 <= hit <= 0.99


def test_a_seed_is_an_interval() -> None:
    values = [float(x) for x in range(20)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_answers_of_one_group_are_not_independent() -> None:
    """Ten copies of each answer know no more than one: by groups the interval stays, without them it shrinks."""
    once = [float(x) for x in np.random.default_rng(0).normal(size=30)]
    copies = [x for x in once for _ in range(10)]
    groups = [i for i in range(30) for _ in range(10)]

    def width(interval: Interval | None) -> float:
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        return interval.high - interval.low

    assert width(bootstrap_interval(copies, groups=groups)) == pytest.approx(width(bootstrap_interval(once)))
    assert width(bootstrap_interval(copies)) < 0.5 * width(bootstrap_interval(once))


def test_nothing_measured_is_not_zero() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([None, None]) is None
    assert bootstrap_interval([None, 4.0, None]) == Interval(4.0, None, None, n=1, unscored=2)
    assert bootstrap_interval([4.0, 6.0], groups=["a", "a"]) == Interval(5.0, None, None, n=2)
    found = bootstrap_interval([None, 100.0, 100.0])
    assert found == Interval(100.0, 100.0, 100.0, n=2, unscored=1)


def test_what_is_no_number_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match=r"must be finite, got .*; unscored is None"):
            bootstrap_interval([1.0, bad])
    with pytest.raises(InputError, match="got 2 values and 1 groups"):
        bootstrap_interval([1.0, 2.0], groups=["a"])


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    before = [float(x) for x in rng.normal(0, 10, size=50)]
    after = [x + 1 for x in before]
    found = paired_difference(after, before)
    assert found is not None
    assert found.mean == pytest.approx(1)
    assert found.low == pytest.approx(1)
    assert paired_difference([None, 2.0, 3.0], [1.0, None, 1.0]) == Interval(2.0, None, None, n=1, unscored=2)
    assert paired_difference([None], [None]) is None
    with pytest.raises(InputError, match="got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_intervals_as_text() -> None:
    assert str(Interval(50.0, 40.0, 60.06, 7, 2)) == "50.0 [40.0, 60.1] (n 7, 2 unscored)"
    assert str(Interval(50.0, None, None, 1)) == "50.0 (n 1)"


@pytest.mark.parametrize(
    ("malicious", "aligned", "steered", "share"),
    [
        (24, 93, 77, 100 * 53 / 69),
        (0, 100, 0, 0),
        (0, 100, 100, 100),
        (20, 80, 10, -100 / 6),
        (20, 80, 95, 125),
        (50, 50, 80, None),
        (90, 10, 50, None),
        (None, 90, 50, None),
        (10, None, 50, None),
        (10, 90, None, None),
    ],
)
def test_recovered(malicious: Any, aligned: Any, steered: Any, share: float | None) -> None:
    assert recovered(malicious=malicious, aligned=aligned, steered=steered) == (share and pytest.approx(share))


# --------------------------------------------------------------------------------------------------- reliability


def test_a_good_mean_may_hide_inputs_that_got_worse() -> None:
    before = [50.0] * 20
    even = reliability([55.0] * 20, before, better="higher")
    uneven = reliability([80.0] * 15 + [-20.0] * 5, before, better="higher")
    assert even is not None and uneven is not None
    assert even.change.mean == uneven.change.mean == pytest.approx(5.0)
    assert (even.wrong.mean, even.worst_decile) == (0.0, pytest.approx(5.0))
    assert (uneven.wrong.mean, uneven.worst_decile) == (0.25, pytest.approx(-70.0))
    assert uneven.wrong.low is not None and uneven.wrong.low > 0


def test_reliability_against_counting() -> None:
    rng = np.random.default_rng(0)
    after, before = rng.normal(size=(2, 37))
    for better, sign in (("higher", 1), ("lower", -1)):
        found = reliability(list(after), list(before), better=better)  # type: ignore[arg-type]
        change = sign * (after - before)
        assert found is not None
        assert found.change.mean == pytest.approx(change.mean())
        assert found.wrong.mean == pytest.approx((change < 0).mean())
        assert found.worst_decile == pytest.approx(np.partition(change, 4)[:4].mean())  # a tenth of 37, rounded up
    same = reliability([1.0, 2.0], [1.0, 2.0], better="lower")
    assert same is not None and same.wrong.mean == 0.0


def test_a_scenario_counts_once_however_many_answers_it_has() -> None:
    after, before = [1.0, 1.0, 1.0, -5.0], [0.0, 0.0, 0.0, 0.0]
    found = reliability(after, before, better="higher", groups=["a", "a", "a", "b"])
    assert found is not None
    assert (found.change.mean, found.wrong.mean, found.worst_decile) == (-2.0, 0.5, -5.0)
    unscored = reliability([*after, None], [*before, 1.0], better="higher", groups=["a", "a", "a", "b", "c"])
    assert unscored is not None
    assert (unscored.change.n, unscored.change.unscored) == (2, 1)
    assert reliability([None], [1.0], better="higher") is None
    with pytest.raises(InputError, match="got 1, 2"):
        reliability([1.0], [1.0, 2.0], better="higher")
    with pytest.raises(InputError, match="higher or lower, got 'bigger'"):
        reliability([1.0], [1.0], better="bigger")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be finite"):
        reliability([math.nan], [1.0], better="higher")


def test_the_share_recovered_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    malicious, aligned = rng.uniform(0, 20, 60), rng.uniform(80, 100, 60)
    half = (malicious + aligned) / 2
    found = recovered_interval(malicious.tolist(), aligned.tolist(), half.tolist())
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(50)
    assert found.low == pytest.approx(50)  # the same share of every scenario: nothing to be unsure of
    assert found.high == pytest.approx(50)
    # as a bootstrap by hand
    steered = np.where(rng.random(60) < 0.7, aligned, malicious)
    found = recovered_interval(malicious.tolist(), aligned.tolist(), steered.tolist(), seed=1)
    assert found is not None
    drawn = np.random.default_rng(9).integers(60, size=(4000, 60))
    shares = [recovered(malicious[at].mean(), aligned[at].mean(), steered[at].mean()) for at in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=1.5)  # type: ignore[arg-type]


def test_a_share_of_no_gap_or_of_nothing_is_none() -> None:
    assert recovered_interval([5.0, 6.0], [5.0, 6.0], [9.0, 9.0]) is None
    assert recovered_interval([None, None], [90.0, 90.0], [9.0, 9.0]) is None
    one = recovered_interval([0.0], [100.0], [50.0])
    assert one is not None
    assert (one.mean, one.low, one.n) == (50.0, None, 1)
    unscored = recovered_interval([0.0, None, 0.0], [100.0, 100.0, 100.0], [50.0, 50.0, None])
    assert unscored is not None
    assert (unscored.mean, unscored.n, unscored.unscored) == (50.0, 1, 2)
    # a gap that most draws do not have
    faint = recovered_interval([0.0, 100.0] * 20, [100.0, 0.0] * 19 + [100.0, 1.0], [50.0] * 40)
    assert faint is not None
    assert faint.low is None
