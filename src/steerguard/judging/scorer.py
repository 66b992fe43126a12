"""`JudgeScorer`: judges in the place of a scorer, and how far they agree.

Every answer gets two verdicts of every judge in every draw: its trait and its coherence, in calls of their own. An
answer's score is the mean over the judges that gave one, each of them the mean of its draws, so that no judge weighs more
than another. Where no judge gave a verdict, the score is None and its note says why.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from steerguard.errors import JudgeError
from steerguard.judging.agreeing import Agreement, agreement
from steerguard.judging.budget import Budget, Estimate, SpendLimit, Spent
from steerguard.judging.cache import Cache
from steerguard.judging.config import JudgeConfig
from steerguard.judging.prompts import PROMPT_VERSION, coherence_question, rubric_digest, trait_question
from steerguard.scorers import Score, Scorer
from steerguard.traits import Scenario, Trait

if TYPE_CHECKING:
    from steerguard.judging.asking import Stage
    from steerguard.judging.endpoint import Call

Part = Literal["trait", "coherence"]
PARTS: tuple[Part, ...] = ("trait", "coherence")


@dataclass(frozen=True)
class Judgement:
    """What one judge said of one answer's trait or coherence once."""

    judge: str
    part: Part
    draw: int
    value: float | None
    "None: unscored"
    reason: str
    "the judge's, or why there is no verdict"


@dataclass(frozen=True)
class AgreementReport:
    """How far judges agree with each other and with themselves."""

    judges: Mapping[Part, Agreement]
    "between judges, each the mean of its draws; scorers that were put beside them are among the raters"
    repeats: Mapping[str, Mapping[Part, Agreement]]
    "by judge, between its draws; empty where there is one draw"
    failed: Mapping[str, Mapping[Part, int]]
    "by rater, answers without a verdict"

    def __str__(self) -> str:
        lines = [f"{part} between judges: {found}" for part, found in self.judges.items() if len(found.raters) > 1]
        lines += [
            f"{part} between draws of {name}: {found}" for name, parts in self.repeats.items() for part, found in parts.items()
        ]
        lines += [f"{name}: no verdict on {part} of {n} answers" for name, p in self.failed.items() for part, n in p.items() if n]
        return "\n".join(lines) or "one judge and one draw: nothing to compare"


class JudgeScorer:
    """Scores answers by what judges say of them.

    Args:
        trait: whose rubric and poles the judges are told.
        judges: one or several; several weigh the same.
        repeats: draws of every verdict, averaged.
        cache: a JSON-lines file that verdicts are kept in and found again in; None: kept in memory.
        limit: the most that this scorer may spend; or a `Budget` that is shared with others.
        progress: called with (what, done, total).

    Raises:
        JudgeError: no judge, one judge twice, no draw, a limit on money with a judge without prices, or a cache that
            cannot be used.
    """

    def __init__(
        self,
        trait: Trait,
        judges: JudgeConfig | Sequence[JudgeConfig],
        *,
        repeats: int = 1,
        cache: str | os.PathLike[str] | Cache | None = None,
        limit: SpendLimit | Budget | None = None,
        progress: Stage | None = None,
    ) -> None:
        self.trait, self.judges, self.repeats = trait, as_judges(judges), repeats
        if repeats < 1:
            raise JudgeError(f"a judge needs at least one draw, got repeats = {repeats}")
        self.budget = limit if isinstance(limit, Budget) else Budget(limit)
        for judge in self.judges:
            self.budget.check_prices(judge)
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.progress = progress

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What decides the scores: judges and their settings, draws, the rubric, the wording of what is asked."""
        return {
            "scorer": "judge", "judges": [judge.settings for judge in self.judges], "repeats": self.repeats,
            "rubric": rubric_digest(self.trait), "prompt": PROMPT_VERSION,
        }  # fmt: skip

    @property
    def spent(self) -> Spent:
        "what the budget has spent so far"
        return self.budget.spent

    def __repr__(self) -> str:
        names = ", ".join(judge.model for judge in self.judges)
        return f"JudgeScorer({self.trait.name} by {names}, {self.repeats} draws; {self.spent})"

    # ------------------------------------------------------------------------------------------------------------

    def estimate(self, asked: Sequence[Scenario], answers: Sequence[str]) -> Estimate:
        """What `scores` would cost; nothing is sent."""
        return estimate((call for calls in self._calls(asked, answers) for call in calls.values()), self.cache)

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        """The score of each answer; None in it where no judge gave a verdict, with why in the note.

        Raises:
            JudgeError: a judge that is set up wrongly, or no judge that answers; what was judged is kept.
            SpendLimitReached: likewise.
        """
        return [self._score(found) for found in self.judgements(asked, answers)]

    def judgements(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[list[Judgement]]:
        """Everything that was said of each answer: every judge, part and draw. Raises as `scores`."""
        from steerguard.judging.asking import Asker

        plan = self._calls(asked, answers)
        asker = Asker(self.cache, self.budget, what="verdicts of judges", progress=self.progress)
        asker.ask(call for calls in plan for call in calls.values())
        return [[self._judgement(key, call, asker.missing) for key, call in calls.items()] for calls in plan]

    def agreement(
        self, asked: Sequence[Scenario], answers: Sequence[str], *, beside: Mapping[str, Scorer] | None = None
    ) -> AgreementReport:
        """How far the judges agree on these answers.

        Args:
            beside: other scorers by name, such as `{"exact": ExactScorer(...)}`, to compare the judges with.
        """
        found = self.judgements(asked, answers)
        names = [judge.model for judge in self.judges]
        judges: dict[Part, dict[str, list[float | None]]] = {
            part: {name: [_mean(_values(row, part, name)) for row in found] for name in names} for part in PARTS
        }
        for name, scorer in (beside or {}).items():
            others = scorer.scores(asked, answers)
            for part in PARTS:
                judges[part][name] = [getattr(score, part) for score in others]
        repeats = {
            name: {part: agreement(_by_draw(found, part, name, self.repeats)) for part in PARTS}
            for name in (names if self.repeats > 1 else [])
        }
        failed = {name: {part: judges[part][name].count(None) for part in PARTS} for name in judges["trait"]}
        return AgreementReport({part: agreement(judges[part]) for part in PARTS}, repeats, failed)

    # ------------------------------------------------------------------------------------------------------------

    def _calls(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[dict[tuple[str, Part, int], Call]]:
        """The calls of each answer, by (judge, part, draw)."""
        from steerguard.judging.endpoint import Call

        plan = []
        for scenario, answer in zip(asked, answers, strict=True):
            questions = {"trait": trait_question(self.trait, scenario, answer), "coherence": coherence_question(scenario, answer)}
            keys = product(self.judges, PARTS, range(self.repeats))
            plan.append({(j.model, part, draw): Call(j, questions[part], draw) for j, part, draw in keys})
        return plan

    def _judgement(self, key: tuple[str, Part, int], call: Call, missing: Mapping[str, str]) -> Judgement:
        entry = self.cache.get(call.key)
        if entry is None:
            return Judgement(*key, None, missing.get(call.key, "it was not asked"))
        return Judgement(*key, float(entry.value), entry.reason)

    def _score(self, found: Sequence[Judgement]) -> Score:
        values = {part: _mean([_mean(_values(found, part, judge.model)) for judge in self.judges]) for part in PARTS}
        return Score(values["trait"], values["coherence"], self._note(found))

    def _note(self, found: Sequence[Judgement]) -> str:
        """Each judge's reason for its trait, and why a verdict is missing."""
        lines = []
        for one in found:
            who = f"{one.judge}: " if len(self.judges) > 1 else ""
            if one.value is None:
                lines.append(f"{who}{one.part} unscored: {one.reason}")
            elif one.part == "trait":
                lines.append(f"{who}{one.value:g}: {one.reason}")
        return "\n".join(dict.fromkeys(lines))


def as_judges(judges: JudgeConfig | Sequence[JudgeConfig]) -> tuple[JudgeConfig, ...]:
    """One judge or several as a tuple. Raises JudgeError for none, or for one name twice."""
    found = (judges,) if isinstance(judges, JudgeConfig) else tuple(judges)
    names = [judge.model for judge in found]
    if not names:
        raise JudgeError("at least one judge is needed; see `judge_from`")
    if len(set(names)) < len(names):
        raise JudgeError(f"judges need names of their own, got {', '.join(names)}; use `repeats` for several draws of one")
    return found


def estimate(calls: Any, cache: Cache) -> Estimate:
    """What calls would cost that are not in the cache, each key once."""
    unique = {call.key: call for call in calls}
    todo = [call for key, call in unique.items() if key not in cache]
    typical = {(c.judge, c.question.kind): cache.typical_tokens(c.judge, c.question.kind) for c in todo}
    # a token is about four bytes of English
    per_call = [(c, c.hold.tokens_in // 4, min(typical[c.judge, c.question.kind], c.judge.max_tokens)) for c in todo]
    costs = [c.judge.money(sent, received) for c, sent, received in per_call]
    most = [c.judge.money(c.hold.tokens_in, c.hold.tokens_out) for c in todo]
    known = [cost for cost in costs if cost is not None]
    priced = len(known) == len(costs)
    return Estimate(
        verdicts=len(unique),
        cached=len(unique) - len(todo),
        tokens_in=sum(sent for _, sent, _ in per_call),
        tokens_out=round(sum(received for _, _, received in per_call)),
        money=sum(known) if priced else None,
        most=sum(m for m in most if m is not None) if priced else None,
    )


def _values(found: Sequence[Judgement], part: Part, judge: str) -> list[float | None]:
    return [one.value for one in found if one.part == part and one.judge == judge]


def _by_draw(found: Sequence[Sequence[Judgement]], part: Part, judge: str, repeats: int) -> dict[str, list[float | None]]:
    rows = [_values(row, part, judge) for row in found]
    return {f"draw {draw}": [row[draw] for row in rows] for draw in range(repeats)}


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None
