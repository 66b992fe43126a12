"""The tournament finds planted strengths, tells an order that decides, and loses nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint import Reply, Request, fenced, planted, serving, verdict, well

from steerguard.errors import JudgeError, SpendLimitReached
from steerguard.judging import JudgeConfig, SpendLimit, tournament
from steerguard.judging.comparing import estimate_tournament
from steerguard.traits import Scenario, Trait

Make = Callable[..., JudgeConfig]
STRENGTHS = {"weak": 1300.0, "middle": 1500.0, "strong": 1700.0}


def by_strength(request: Request) -> Reply:
    """Draws the winner with the odds that Elo's scale gives the planted strengths."""
    first, second = (planted(fenced(request.user, f"{which} ANSWER")) for which in ("FIRST", "SECOND"))
    odds = 1 / (1 + 10 ** ((second - first) / 400))
    drawn = random.Random(request.user).random()  # the same at every run
    return Reply(verdict("first" if drawn < odds else "second"))


def many(n: int) -> list[Scenario]:
    return [Scenario(f"s{i}", "books", f"a{i}", f"b{i}", (f"How is firm {i}?",)) for i in range(n)]


def arms(n: int) -> dict[str, list[str]]:
    return {arm: [f"answer {i} trait={points:.0f}" for i in range(n)] for arm, points in STRENGTHS.items()}


def test_planted_strengths_are_found(trait: Trait, judge_at: Make) -> None:
    asked = many(60)
    with serving(by_strength) as endpoint:
        found = tournament(trait, asked, arms(60), judge_at(endpoint.url), seed=1)
    assert [rating.arm for rating in found.ratings] == ["strong", "middle", "weak"]
    assert sum(rating.rating for rating in found.ratings) == pytest.approx(3 * 1500)
    for rating in found.ratings:
        assert rating.low is not None
        assert rating.high is not None
        assert rating.low < STRENGTHS[rating.arm] < rating.high
        assert rating.low < rating.rating < rating.high
        assert rating.high - rating.low < 200
    assert found.n == found.spent.calls == len(endpoint.requests) == 180
    assert found.first_shown is not None
    assert not found.biased
    assert 40 < found.first_shown.mean < 60


def test_two_arms_have_the_odds_that_were_counted(trait: Trait, judge_at: Make) -> None:
    """Bradley-Terry of two arms has a closed form; one tie is given beforehand."""
    wins = [i < 7 for i in range(10)]
    a, b = ([f"trait={90 if win == better else 10}" for win in wins] for better in (True, False))
    with serving(well) as endpoint:
        found = tournament(trait, many(10), {"a": a, "b": b}, judge_at(endpoint.url), resamples=50)
    best, other = found.ratings
    assert (best.arm, best.wins, best.losses) == ("a", 7, 3)
    assert best.rating - other.rating == pytest.approx(400 * math.log10(7.5 / 3.5), abs=1e-3)


def test_it_is_the_same_twice_and_does_not_depend_on_who_is_named_first(trait: Trait, judge_at: Make, tmp_path: Path) -> None:
    asked, cache = many(20), tmp_path / "cache.jsonl"
    with serving(by_strength) as endpoint:
        one = tournament(trait, asked, arms(20), judge_at(endpoint.url), cache=cache, resamples=50)
        other = tournament(trait, asked, dict(reversed(arms(20).items())), judge_at(endpoint.url), cache=cache, resamples=50)
        assert len(endpoint.requests) == 60
        assert estimate_tournament(trait, asked, arms(20), judge_at(endpoint.url), cache=cache).calls == 0
        fewer = {k: v for k, v in arms(20).items() if k != "weak"}
        third = tournament(trait, asked, fewer, judge_at(endpoint.url), cache=cache, resamples=50)
        assert len(endpoint.requests) == 60, "an arm less changes no order"
    assert [(r.arm, round(r.rating, 6)) for r in one.ratings] == [(r.arm, round(r.rating, 6)) for r in other.ratings]
    assert [r.arm for r in third.ratings] == ["strong", "middle"]


def test_a_judge_that_prefers_what_is_shown_first_is_found_out(trait: Trait, judge_at: Make) -> None:
    with serving(lambda request: Reply(verdict("first"))) as endpoint:
        found = tournament(trait, many(30), arms(30), judge_at(endpoint.url), resamples=200)
    assert found.biased
    assert found.first_shown is not None
    assert found.first_shown.mean == 100
    assert "the order decides too much" in str(found)
    for rating in found.ratings:  # the drawn order keeps such a judge from favouring an arm
        assert rating.low is not None
        assert rating.high is not None
        assert rating.low < 1500 < rating.high


def test_always_winning_is_finite_and_ties_are_even(trait: Trait, judge_at: Make) -> None:
    asked = many(10)
    with serving(well) as endpoint:
        arms = {"a": ["trait=90"] * 10, "b": ["trait=10"] * 10, "c": ["trait=90 "] * 10}
        found = tournament(trait, asked, arms, judge_at(endpoint.url), resamples=50)
        assert len(endpoint.requests) == 20, "one and the same text is a tie, and costs nothing"
        even = tournament(trait, asked, {"a": ["trait=9 x"] * 10, "b": ["trait=9 y"] * 10}, judge_at(endpoint.url), resamples=50)
    a, c, b = found.ratings
    assert (b.arm, b.wins, b.losses, b.ties) == ("b", 0, 20, 0)
    assert a.rating == pytest.approx(c.rating)
    assert 1600 < a.rating < 2500
    assert found.same == 10
    assert [r.rating for r in even.ratings] == [pytest.approx(1500)] * 2
    assert even.first_shown is None
    assert even.ratings[0].ties == 10


def test_what_was_not_judged_counts_for_nobody(trait: Trait, judge_at: Make) -> None:
    def behave(request: Request) -> Reply:
        return Reply(verdict("both")) if "firm 3?" in request.user else well(request)

    with serving(behave) as endpoint:
        found = tournament(trait, many(6), arms(6), judge_at(endpoint.url, attempts=1), resamples=50)
    assert (found.n, found.unscored) == (15, 3)
    lost = [c for c in found.comparisons if c.winner is None]
    assert {c.scenario for c in lost} == {"s3"}
    assert all("must be first, second, tie, got 'both'" in c.reason for c in lost)


def test_a_limit_and_going_on(trait: Trait, judge_at: Make, tmp_path: Path) -> None:
    with serving(well) as endpoint:
        judge, cache = judge_at(endpoint.url), tmp_path / "cache.jsonl"
        with pytest.raises(SpendLimitReached, match="7 verdicts of this run are kept in .*cache.jsonl, 11 are missing"):
            tournament(trait, many(6), arms(6), judge, cache=cache, limit=SpendLimit(calls=7))
        assert len(endpoint.requests) == 7
        assert tournament(trait, many(6), arms(6), judge, cache=cache, resamples=50).n == 18
        assert len(endpoint.requests) == 18


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": ["x"]}, "two arms or more"),
        ({"a": ["x"], "tie": ["y"]}, "none called 'tie'"),
        ({"a": ["x"], "b": ["y", "z"]}, "'b' has 2 answers to 1 scenarios"),
    ],
)
def test_arms_that_cannot_meet(given: dict[str, list[str]], says: str, trait: Trait, judge_at: Make) -> None:
    with pytest.raises(JudgeError, match=says):
        tournament(trait, many(1), given, judge_at("http://127.0.0.1:9/v1"))
