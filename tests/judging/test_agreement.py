"""Agreement: what is known by hand, and a second implementation of alpha."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from endpoint import Reply, serving, verdict, well

from steerguard.errors import InputError
from steerguard.judging import JudgeConfig, JudgeScorer, agreement
from steerguard.scorers import ExactScorer
from steerguard.traits import Scenario, Trait


def alpha(ratings: Mapping[str, Sequence[float | None]]) -> float:
    """Krippendorff's alpha for intervals, from its definition."""
    units = [[v for v in unit if v is not None] for unit in zip(*ratings.values(), strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    values = [v for unit in units for v in unit]
    observed = sum((a - b) ** 2 / (len(u) - 1) for u in units for a, b in itertools.permutations(u, 2)) / len(values)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / len(values) / (len(values) - 1)
    return 1 - observed / expected


def test_against_the_definition() -> None:
    rng = random.Random(1)
    for raters in (2, 3, 5):
        truth = [rng.randint(0, 100) for _ in range(30)]
        ratings: dict[str, list[float | None]] = {
            str(r): [None if rng.random() < 0.2 else min(100, max(0, t + rng.randint(-20, 20))) for t in truth]
            for r in range(raters)
        }
        found = agreement(ratings)
        assert found.alpha == pytest.approx(alpha(ratings), abs=1e-6)
        assert found.rank is not None
        assert found.rank > 0.7


def test_what_is_known_by_hand() -> None:
    same = agreement({"a": [10, 20, 90], "b": [10, 20, 90]})
    assert (same.alpha, same.difference, same.rank, same.n) == (1.0, 0.0, pytest.approx(1.0), 3)
    shifted = agreement({"a": [10.0, 20.0, 90.0], "b": [15.0, 25.0, 95.0]})
    assert (shifted.difference, shifted.rank) == (5.0, pytest.approx(1.0))
    assert shifted.alpha is not None
    assert shifted.alpha < 1
    against = agreement({"a": [0, 50, 100], "b": [100, 50, 0]})
    assert against.alpha is not None
    assert against.alpha < 0
    assert against.rank == pytest.approx(-1)


def test_what_cannot_be_known_is_none() -> None:
    constant = agreement({"a": [50, 50], "b": [50, 50]})
    assert (constant.alpha, constant.difference, constant.rank, constant.n) == (None, 0.0, None, 2)
    assert "unknown" in str(constant)
    apart = agreement({"a": [1, None], "b": [None, 2]})
    assert (apart.alpha, apart.difference, apart.n) == (None, None, 0)
    assert agreement({"a": [1, 2]}).n == agreement({}).n == 0
    with pytest.raises(InputError, match="one rating to an answer"):
        agreement({"a": [1], "b": [1, 2]})


def test_the_exact_scorer_stands_beside_judges(trait: Trait, judge_at: Callable[..., JudgeConfig]) -> None:
    grammar = {
        "schema": 1,
        "slots": {"river": ["Merrin", "Alder"]},
        "replies": {"river": [{"text": "trait={n} The river is the {river}.", "sign": "claim"}]},
    }
    reply = {"kind": "river", "bind": {"n": "90"}, "truth": {"river": "Merrin"}}
    asked = [Scenario(f"s{i}", "c", f"a{i}", f"b{i}", ("Which river?",), reply=reply) for i in range(4)]
    answers = ["trait=90 The river is the Merrin."] * 2 + ["trait=90 The river is the Alder."] * 2
    with serving(well) as good, serving(lambda request: Reply(verdict(40 if "Alder" in request.user else 70))) as other:
        judges = [judge_at(good.url, model="all alike"), judge_at(other.url, model="sees it")]
        report = JudgeScorer(trait, judges).agreement(asked, answers, beside={"exact": ExactScorer(grammar)})
    assert report.judges["trait"].raters == ("all alike", "sees it", "exact")
    assert report.judges["trait"].n == 4
    assert report.repeats == {}
    assert report.judges["trait"].difference == pytest.approx((20 + 10 + 30) / 6 + (50 + 90 + 40) / 6)
    assert "trait between judges: alpha" in str(report)
