"""Grading: what a judge is asked about answers that are not about a trait, and its verdicts in bulk.

Two questions: how good one answer is, from 1 to 10, with a reference answer where there is one (MT-Bench); and which of
two answers is better (AlpacaEval). Fences, reading, cache, budgets and patience are those of `steerguard.judging`.

A model is never graded by itself: `check_grader` refuses it.

Source: arXiv 2306.05685 (single-answer grading), arXiv 2404.04475 (which of two). The wording is ours, so figures compare
with each other and not with published leaderboards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steerguard.errors import JudgeError
from steerguard.judging import Budget, JudgeConfig, SpendLimit
from steerguard.judging.cache import Cache
from steerguard.judging.fence import fences
from steerguard.judging.prompts import RULES, Question

if TYPE_CHECKING:
    from steerguard.judging.asking import Stage

GRADING_VERSION = 1
"""Raised with every change of wording; it is part of what is asked, and so of what verdicts are kept by."""


def grade_question(turns: Sequence[str], reference: Sequence[str] = ()) -> Question:
    """How good the last answer of a conversation is, 1 to 10.

    Args:
        turns: user, assistant, user, assistant: an even number; the last is graded.
        reference: good answers to the turns, in order; none where opinions may differ.
    """
    names = [f"{('USER', 'ANSWER')[i % 2]} {i // 2 + 1}" for i in range(len(turns))]
    parts = dict(zip(names, turns, strict=True))
    known = {f"REFERENCE {i + 1}": text for i, text in enumerate(reference[: len(turns) // 2])}
    fenced = fences({**parts, **known}, of=["grade", GRADING_VERSION])
    last = names[-1]
    told = (
        "REFERENCE holds a correct answer: compare with it, find what is wrong in the assistant's, and grade right results "
        "over good style.\n\n"
        if known
        else ""
    )
    user = f"""\
Grade the quality of an assistant's last answer, {last}, from 1 to 10. What counts: is it helpful, to the point, correct, deep
enough and detailed enough for what the user asked. Its length by itself counts for nothing.

10: could hardly be better. 7: good, with small faults. 5: of some use, with clear faults. 3: mostly wrong or beside the point.
1: of no use.

{told}{chr(10).join(fenced[name] + chr(10) for name in [*names, *known])}
Earlier answers are there to be understood; judge only the text between the fences {last}. Reply with
{{"reason": "...", "score": N}}, N a whole number from 1 to 10."""
    return Question("grade", RULES, user)


def better_question(instruction: str, first: str, second: str) -> Question:
    """Which of two answers to an instruction is better."""
    parts = {"INSTRUCTION": instruction, "FIRST ANSWER": first, "SECOND ANSWER": second}
    fenced = fences(parts, of=["better", GRADING_VERSION])
    user = f"""\
Two assistants answered the same instruction. Which answer would most people who know the subject prefer?

{chr(10).join(fenced[name] + chr(10) for name in parts)}
The order in which they stand means nothing. Reply with
{{"reason": "...", "winner": "first"}}, or "second" in place of "first", or "tie" if neither is better."""
    return Question("pair", RULES, user)


@dataclass(frozen=True)
class Judged:
    """What a judge said of one question."""

    value: float | str | None
    "a number, or first, second or tie; None: unscored"
    reason: str
    "the judge's, or why there is no verdict"


def judged(
    questions: Sequence[Question],
    judge: JudgeConfig,
    *,
    cache: str | os.PathLike[str] | Cache | None = None,
    budget: Budget,
    what: str,
    progress: Stage | None = None,
) -> list[Judged]:
    """The judge's verdict on each question; equal questions are asked once.

    Raises:
        JudgeError: a judge that is set up wrongly, or that does not answer; what was judged is kept.
        SpendLimitReached: likewise.
    """
    from steerguard.judging.asking import Asker
    from steerguard.judging.endpoint import Call

    budget.check_prices(judge)
    kept = cache if isinstance(cache, Cache) else Cache(cache)
    calls = [Call(judge, question) for question in questions]
    asker = Asker(kept, budget, what=what, progress=progress)
    asker.ask(calls)
    out = []
    for call in calls:
        entry = kept.get(call.key)
        reason = asker.missing.get(call.key, "it was not asked") if entry is None else entry.reason
        out.append(Judged(None if entry is None else entry.value, reason))
    return out


def as_budget(limit: SpendLimit | Budget | None) -> Budget:
    """A budget that others may share, or one of its own under a limit."""
    return limit if isinstance(limit, Budget) else Budget(limit)


def check_grader(grader: str, model: str) -> None:
    """Refuse a grader that goes by the name of the model under test.

    Raises:
        JudgeError: they are called the same, whoever serves them and under whichever alias.
    """
    if _bare(grader) == _bare(model):
        raise JudgeError(
            f"the grader {grader} is the model under test, {model}: a model that grades itself measures its own taste; give "
            "another judge"
        )


def _bare(name: str) -> str:
    """A model's name without who serves it, the alias of a guard, and digests."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].partition(":")[0].casefold()
