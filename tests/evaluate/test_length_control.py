"""The length-controlled win rate: cases by hand, AlpacaEval's own code as the oracle, and what it must not be moved by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerguard.errors import InputError
from steerguard.evaluate.length_control import WEAK, Gamed, fit_glm, length_controlled, read_gamed

ORACLE = Path(__file__).parent / "oracle"


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(("won", "n", "strength"), [(30, 40, 1.0), (12, 40, 0.5), (21, 40, 100.0)])
def test_one_term_has_the_closed_form(won: int, n: int, strength: float) -> None:
    """Where the slope of the penalty meets that of the loss: strength * (won - n sigmoid(w)) = sign(w)."""
    y = np.array([1.0] * won + [0.0] * (n - won))
    w = fit_glm(np.ones((n, 1)), y, np.ones(n), strength)
    share = won / n - math.copysign(1, won - n / 2) / (strength * n)
    assert sigmoid(w[0]) == pytest.approx(share, abs=1e-6)


def test_a_penalty_that_is_too_strong_leaves_nothing() -> None:
    assert fit_glm(np.ones((10, 1)), np.array([1.0] * 6 + [0.0] * 4), np.ones(10), 0.5)[0] == 0


def test_two_terms_are_where_the_gradient_says() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=60), np.ones(60)], axis=1)
    y, weight = rng.random(60), rng.random(60)
    w = fit_glm(x, y, weight, 3.0)
    slope = 3.0 * x.T @ (weight * (sigmoid(x @ w) - y))
    assert slope + np.sign(w) == pytest.approx(np.zeros(2), abs=1e-5)
    near = fit_glm(x, y, weight, 3.0, w + 0.1)
    assert near == pytest.approx(w, abs=1e-5)


def test_where_all_are_equally_long_it_is_the_win_rate() -> None:
    preference = [1.0] * 30 + [0.0] * 18 + [0.5] * 2
    found = length_controlled(preference, [(10, 10)] * 50, resamples=200)
    assert found is not None
    assert found.win_rate.mean == pytest.approx(100 * (31 / 50 - 1 / (WEAK * 50)), abs=1e-3)
    assert found.win_rate.low < 62 < found.win_rate.high  # type: ignore[operator]
    assert (found.win_rate.n, found.weights["length"]) == (50, 0)


def test_a_judge_that_likes_length_is_seen_through() -> None:
    """The guarded answers are longer and win by that alone: the raw rate says better, the controlled one does not."""
    rng = np.random.default_rng(1)
    one = rng.integers(100, 300, 800)
    other = one + rng.integers(-100, 400, 800)
    delta = (one - other) / np.std(one - other, ddof=1)
    by_length = (rng.random(800) < sigmoid(-2 * np.tanh(delta))).astype(float)
    lengths = list(zip(one.tolist(), other.tolist(), strict=True))
    found = length_controlled(list(by_length), lengths, resamples=200)
    assert found is not None
    assert 100 * by_length.mean() > 60
    assert found.win_rate.low < 50 < found.win_rate.high  # type: ignore[operator]
    assert found.weights["length"] == pytest.approx(-2, abs=0.6)
    # and where the guarded answers are better at any length, it says so
    better = (rng.random(800) < sigmoid(1 - 2 * np.tanh(delta))).astype(float)
    found = length_controlled(list(better), lengths, resamples=200)
    assert found is not None and found.win_rate.low is not None and found.win_rate.high is not None
    assert found.win_rate.low > 60 and found.win_rate.low < 100 * sigmoid(1) < found.win_rate.high


def test_what_is_unscored_is_left_out_and_counted() -> None:
    lengths = [(10 + i % 7, 12 + i % 5) for i in range(40)]
    preference: list[float | None] = [float(i % 3 == 0) for i in range(40)]
    fewer = length_controlled([*preference, None, None], [*lengths, (1, 900), (1, 900)], resamples=20)
    alone = length_controlled(preference, lengths, resamples=20)
    assert fewer is not None and alone is not None
    assert fewer.win_rate.mean == alone.win_rate.mean
    assert (fewer.win_rate.n, fewer.win_rate.unscored) == (40, 2)
    assert length_controlled([None], [(1, 2)]) is None


def test_one_comparison_has_no_interval() -> None:
    found = length_controlled([1.0], [(3, 5)])
    assert found is not None and (found.win_rate.low, found.win_rate.high) == (None, None)


@pytest.mark.parametrize("wrong", [([1.0, 2.0], [(1, 1), (1, 1)]), ([1.0], [(1, 1), (1, 1)])])
def test_what_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="preference"):
        length_controlled(*wrong)


# ------------------------------------------------------------------------------------------------ the oracle


@pytest.mark.parametrize("n", [120, 60])
def test_it_agrees_with_alpaca_evals_own_code(n: int) -> None:
    """To a hundredth of a point, for all three of its models, what its penalty removes wholly among them."""
    case = json.loads((ORACLE / f"annotations-{n}.json").read_text())
    gamed = read_gamed(ORACLE / f"gamed-{n}.csv")
    unregularised = Gamed(gamed.difficulty, gamed.features[:0], gamed.preference[:0])
    options: dict[str, dict[str, Any]] = {
        "length_controlled_v1": {"gamed": gamed},
        "length_controlled_noreg": {"gamed": unregularised},
        "length_controlled_minimal": {"cross_validated": True},
    }
    lengths = [tuple(pair) for pair in case["lengths"]]
    for name, more in options.items():
        found = length_controlled(case["preference"], lengths, resamples=0, **more)
        assert found is not None
        assert found.win_rate.mean == pytest.approx(case["expected"][name], abs=0.01), name
    # what an uncontrolled rate, or another sign of the length, would be told apart from
    raw = 100 * float(np.mean(case["preference"]))
    assert abs(raw - case["expected"]["length_controlled_v1"]) > 0.5
    turned = length_controlled(case["preference"], [(b, a) for a, b in lengths], resamples=0, gamed=gamed)
    assert turned is not None and abs(turned.win_rate.mean - case["expected"]["length_controlled_v1"]) > 0.02


def test_a_penalty_that_hides_every_guard_is_not_the_default() -> None:
    case = json.loads((ORACLE / "annotations-60.json").read_text())
    lengths = [tuple(pair) for pair in case["lengths"]]
    hidden = length_controlled(case["preference"], lengths, resamples=50, cross_validated=True)
    shown = length_controlled(case["preference"], lengths, resamples=50)
    assert hidden is not None and shown is not None
    assert hidden.win_rate.mean == pytest.approx(50, abs=1e-6)
    assert shown.win_rate.mean > 55
    assert hidden.win_rate.high > hidden.win_rate.low + 5  # type: ignore[operator]


def test_a_file_that_is_another_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "x.csv"
    for text, why in (
        ("a,b\n1,2\n", "must have the columns"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,2,0,0,False\n", ":2: .*0 to 1"),
        ("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,x,0,0,False\n", ":2: "),
    ):
        wrong.write_text(text)
        with pytest.raises(InputError, match=why):
            read_gamed(wrong)
    with pytest.raises(InputError, match="difficulty of instruction 999"):
        length_controlled([1.0], [(1, 1)], instructions=[999], gamed=read_gamed(ORACLE / "gamed-60.csv"))
