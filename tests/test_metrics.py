"""Metrics: against counting by hand, against theory, and for what was not measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from steerguard.errors import InputError
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered, repetition, words

# ---------------------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 4, 0),
        ("one two three", 4, 0),
        ("one two three four", 4, 0),
        ("a b c d e f g h", 4, 0),
        ("a b c d a b c d", 4, 1 / 5),
        ("a a a a a", 4, 1 / 2),
        ("a a a a", 1, 3 / 4),
        ("A b, c! D. a B c (d)", 4, 1 / 5),
        ("ﬁne don’t go on, FINE don’t GO on", 4, 1 / 5),
        ("don't do it, don t do it", 2, 1 / 6),
    ],
)
def test_repetition(text: str, n: int, share: float) -> None:
    assert repetition(text, n) == pytest.approx(share)


def test_repetition_against_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = [str(x) for x in rng.integers(4, size=rng.integers(40))]
        grams = [tuple(said[i : i + 4]) for i in range(len(said) - 3)]
        again = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert repetition(" ".join(said)) == pytest.approx(again / len(grams) if grams else 0)


def test_a_loop_repeats_almost_all_and_a_text_almost_nothing() -> None:
    assert repetition("I am sorry about that. " * 50) > 0.97
    assert repetition(" ".join(map(str, range(200)))) == 0


def test_words() -> None:
    assert words("It's THE_end — “naïve” 3.5% ’tis") == ["it's", "the", "end", "naïve", "3", "5", "tis"]


def test_grams_have_words() -> None:
    with pytest.raises(InputError, match="n = 0"):
        repetition("a b", 0)


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
