"""The tournament: answers of several arms to the same scenarios, compared two by two, and a rating for each arm.

    result = tournament(trait, scenarios, {"unguarded": a, "StTP": b, "SwFC": c}, judge)

Which answer is shown first is drawn, the same way at every run; how often the first shown wins is reported. Ratings are
Bradley-Terry's through evalica, on Elo's scale about 1500: 400 points more are ten wins to one. Intervals come from
resampling scenarios, not comparisons, since the comparisons on one scenario share its difficulty. Every pair of arms is
given one tie beforehand, so that an arm that always wins has a rating that is finite.

Source: arXiv 2604.08169 (pairwise judgements, random order, Bradley-Terry, start 1500, 1000 bootstraps).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steerguard.errors import JudgeError
from steerguard.files import canonical_json
from steerguard.judging.budget import Budget, Estimate, SpendLimit, Spent
from steerguard.judging.cache import Cache
from steerguard.judging.config import JudgeConfig
from steerguard.judging.prompts import pair_question
from steerguard.judging.scorer import as_judges, estimate
from steerguard.metrics import LEVEL, Interval, bootstrap_interval
from steerguard.traits import Scenario, Trait

if TYPE_CHECKING:
    from steerguard.judging.asking import Stage
    from steerguard.judging.endpoint import Call

START = 1500.0
"""The mean rating."""
SCALE = 400.0
"""Points that make the odds of winning ten to one."""
PRIOR = 1.0
"""Ties that every pair of arms is given beforehand."""
RESAMPLES = 1000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rating:
    """How one arm did."""

    arm: str
    rating: float
    "Bradley-Terry on Elo's scale; the mean over arms is 1500"
    low: float | None
    high: float | None
    "95 % interval over scenarios; None where one scenario cannot give one"
    wins: int
    losses: int
    ties: int

    def __str__(self) -> str:
        known = "" if self.low is None or self.high is None else f" [{self.low:.0f}, {self.high:.0f}]"
        return f"{self.arm}: {self.rating:.0f}{known} ({self.wins} won, {self.losses} lost, {self.ties} tied)"


@dataclass(frozen=True)
class Comparison:
    """One judge's word on one pair of answers."""

    scenario: str
    first: str
    "the arm whose answer was shown first"
    second: str
    judge: str
    winner: str | None
    "an arm, or `tie`; None: unscored"
    reason: str


@dataclass(frozen=True)
class Tournament:
    """Ratings of arms, best first, and how they came about."""

    ratings: tuple[Rating, ...]
    first_shown: Interval | None
    "share of the decided comparisons that the answer shown first won, 0-100, and its interval: 50 is unbiased"
    n: int
    "comparisons that count"
    same: int
    "of them, pairs of one and the same text, which are ties without a judge"
    unscored: int
    "comparisons without a verdict; they count for nobody"
    scenarios: int
    judges: tuple[str, ...]
    seed: int
    resamples: int
    spent: Spent
    comparisons: tuple[Comparison, ...]

    @property
    def biased(self) -> bool:
        "whether the order in which answers were shown decides more than chance would"
        found = self.first_shown
        return found is not None and found.low is not None and found.high is not None and not found.low <= 50 <= found.high

    def __str__(self) -> str:
        order = "unknown" if self.first_shown is None else f"{self.first_shown} %"
        tail = f"shown first, won: {order}{': the order decides too much' if self.biased else ''}"
        return "\n".join([*map(str, self.ratings), f"{self.n} comparisons, {self.unscored} unscored; {tail}"])


def tournament(
    trait: Trait,
    asked: Sequence[Scenario],
    arms: Mapping[str, Sequence[str]],
    judges: JudgeConfig | Sequence[JudgeConfig],
    *,
    seed: int = 42,
    resamples: int = RESAMPLES,
    cache: str | os.PathLike[str] | Cache | None = None,
    limit: SpendLimit | Budget | None = None,
    progress: Stage | None = None,
) -> Tournament:
    """Compare every two arms on every scenario, and rate them.

    Args:
        arms: by name, one answer to each scenario.
        judges: one or several; each compares everything, and each word counts alike.
        seed: of the order of presentation and of the intervals.
        cache: see `JudgeScorer`; one file serves both.
        limit: see `JudgeScorer`.

    Raises:
        JudgeError: arms that cannot be compared, a judge that is set up wrongly, or no judge that answers.
        SpendLimitReached: what was judged is kept.
    """
    from steerguard.judging.asking import Asker

    found = as_judges(judges)
    budget = limit if isinstance(limit, Budget) else Budget(limit)
    for judge in found:
        budget.check_prices(judge)
    kept = cache if isinstance(cache, Cache) else Cache(cache)
    # 1. who meets whom, and who is shown first
    pairs = list(_pairs(asked, arms, seed))
    plan = [(pair, judge, _call(trait, pair, judge)) for pair in pairs for judge in found]
    # 2. what the judges say
    asker = Asker(kept, budget, what="comparisons by judges", progress=progress)
    asker.ask(call for pair, _, call in plan if not pair.same)
    comparisons = tuple(_comparison(pair, judge, call, kept, asker.missing) for pair, judge, call in plan)
    # 3. ratings
    return Tournament(
        ratings=_ratings(comparisons, tuple(arms), tuple(s.id for s in asked), seed, resamples),
        first_shown=_first_shown(comparisons, seed),
        n=sum(c.winner is not None for c in comparisons),
        same=sum(pair.same for pair, _, _ in plan),
        unscored=sum(c.winner is None for c in comparisons),
        scenarios=len(asked),
        judges=tuple(judge.model for judge in found),
        seed=seed,
        resamples=resamples,
        spent=budget.spent,
        comparisons=comparisons,
    )


def estimate_tournament(
    trait: Trait, asked: Sequence[Scenario], arms: Mapping[str, Sequence[str]], judges: JudgeConfig | Sequence[JudgeConfig],
    *, seed: int = 42, cache: str | os.PathLike[str] | Cache | None = None,
) -> Estimate:  # fmt: skip
    """What `tournament` would cost; nothing is sent."""
    kept = cache if isinstance(cache, Cache) else Cache(cache)
    pairs = [pair for pair in _pairs(asked, arms, seed) if not pair.same]
    return estimate((_call(trait, pair, judge) for pair in pairs for judge in as_judges(judges)), kept)


# ---------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class _Pair:
    scenario: Scenario
    first: str
    second: str
    answers: tuple[str, str]

    @property
    def same(self) -> bool:
        return self.answers[0].strip() == self.answers[1].strip()


def _pairs(asked: Sequence[Scenario], arms: Mapping[str, Sequence[str]], seed: int) -> Iterator[_Pair]:
    """Every two arms on every scenario, each pair in its drawn order; a further arm changes no other pair's order."""
    if len(arms) < 2 or "tie" in arms:
        raise JudgeError(f"a tournament needs two arms or more, none called 'tie', got {', '.join(arms) or 'none'}")
    if not asked or len({s.id for s in asked}) < len(asked):
        raise JudgeError(f"a tournament needs scenarios with ids of their own, got {len(asked)}")
    for arm, answers in arms.items():
        if len(answers) != len(asked):
            raise JudgeError(f"the arm {arm!r} has {len(answers)} answers to {len(asked)} scenarios; it needs one to each")
    for i, scenario in enumerate(asked):
        for one, other in combinations(sorted(arms), 2):
            drawn = hashlib.sha256(canonical_json([seed, scenario.id, one, other]).encode()).digest()[0] % 2
            first, second = (one, other) if drawn else (other, one)
            yield _Pair(scenario, first, second, (arms[first][i], arms[second][i]))


def _call(trait: Trait, pair: _Pair, judge: JudgeConfig) -> Call:
    from steerguard.judging.endpoint import Call

    return Call(judge, pair_question(trait, pair.scenario, *pair.answers))


def _comparison(pair: _Pair, judge: JudgeConfig, call: Call, cache: Cache, missing: Mapping[str, str]) -> Comparison:
    entry = cache.get(call.key)
    winner: str | None
    if pair.same:
        winner, reason = "tie", "both answers are one and the same text"
    elif entry is None:
        winner, reason = None, missing.get(call.key, "it was not asked")
    else:
        winner, reason = {"first": pair.first, "second": pair.second}.get(str(entry.value), "tie"), entry.reason
    return Comparison(pair.scenario.id, pair.first, pair.second, judge.model, winner, reason)


# -------------------------------------------------------------------------------------------------------- ratings


def _ratings(
    comparisons: Sequence[Comparison], arms: Sequence[str], scenarios: Sequence[str], seed: int, resamples: int
) -> tuple[Rating, ...]:
    row, column = {s: i for i, s in enumerate(scenarios)}, {arm: i for i, arm in enumerate(arms)}
    won = np.zeros((len(scenarios), len(arms), len(arms)))  # [scenario, winner, loser]; a tie is half a win for each
    tally = {arm: [0, 0, 0] for arm in arms}
    for c in comparisons:
        if c.winner is None:
            continue
        at, first, second = row[c.scenario], column[c.first], column[c.second]
        won[at, first, second] += 1.0 if c.winner == c.first else 0.5 if c.winner == "tie" else 0.0
        won[at, second, first] += 1.0 if c.winner == c.second else 0.5 if c.winner == "tie" else 0.0
        for arm in (c.first, c.second):
            tally[arm][2 if c.winner == "tie" else 0 if c.winner == arm else 1] += 1
    points = _bradley_terry(won.sum(axis=0))
    low, high = _interval(won, seed, resamples)
    known = len(scenarios) > 1
    ratings = [
        Rating(arm, float(points[i]), float(low[i]) if known else None, float(high[i]) if known else None, *tally[arm])
        for i, arm in enumerate(arms)
    ]
    return tuple(sorted(ratings, key=lambda r: -r.rating))


def _interval(won: Floats, seed: int, resamples: int) -> tuple[Floats, Floats]:
    """Percentiles of the ratings over draws of scenarios with replacement."""
    rng = np.random.default_rng(seed)
    n = len(won)
    drawn = np.array([_bradley_terry(won[rng.integers(n, size=n)].sum(axis=0)) for _ in range(resamples)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _bradley_terry(won: Floats) -> Floats:
    """Ratings from a table of wins [winner, loser]."""
    evalica, pandas = _evalica()
    n = len(won)
    winners, losers = np.nonzero(~np.eye(n, dtype=bool))
    found = evalica.bradley_terry(
        winners.tolist(), losers.tolist(), [evalica.Winner.X] * len(winners),
        index=pandas.Index(range(n)), weights=(won[winners, losers] + PRIOR / 2).tolist(), tolerance=1e-9, limit=10_000,
    )  # fmt: skip
    strengths = found.scores.reindex(range(n)).to_numpy(dtype=float)
    points = SCALE * np.log10(strengths)
    centred: Floats = START + points - points.mean()
    return centred


def _first_shown(comparisons: Sequence[Comparison], seed: int) -> Interval | None:
    decided = [c for c in comparisons if c.winner not in (None, "tie")]
    values = [100.0 * (c.winner == c.first) for c in decided]
    return bootstrap_interval(values, groups=[c.scenario for c in decided], seed=seed)


def _evalica() -> tuple[Any, Any]:
    try:
        import evalica
        import pandas
    except ImportError as error:
        raise JudgeError(f'ratings need evalica, and {error.name} is not there; pip install "steerguard[judge]"') from error
    return evalica, pandas
