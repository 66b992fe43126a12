"""MT-Bench: 80 questions in two turns, each answer graded from 1 to 10 by a judge, guarded beside unguarded.

    questions = read_questions("question.jsonl", "reference_answer/gpt-4.jsonl")
    result = mt_bench(model, questions, guard, judge)

The questions are not ours and do not come with steerguard: both files are those of FastChat
(`fastchat/llm_judge/data/mt_bench/`), or files of yours in their format, one JSON object to a line:

    {"question_id": 111, "category": "math", "turns": ["...", "..."]}
    {"question_id": 111, "choices": [{"index": 0, "turns": ["...", "..."]}]}

Mathematics, reasoning and coding are graded beside a reference answer, and refused without one. The second turn is asked
after the arm's own first answer. An answer that both arms give is judged once and has one grade.

Source: arXiv 2306.05685. The wording of the judge is ours; see `grading`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerguard import files
from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.grading import Judged, as_budget, check_grader, grade_question, judged
from steerguard.evaluate.results import ARMS, Paired
from steerguard.files import Malformed
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.judging import Budget, JudgeConfig, SpendLimit, Spent
from steerguard.judging.cache import Cache
from steerguard.metrics.reading import check_unguarded
from steerguard.prompts import conversation
from steerguard.sweeping.answers import Answers, Row

if TYPE_CHECKING:
    from steerguard.fitting import Stage

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are graded beside a reference answer."""
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MTQuestion:
    """One question."""

    id: str
    category: str
    turns: tuple[str, ...]
    "what the user says, turn by turn"
    reference: tuple[str, ...] = ()
    "a good answer to each turn; () where there is none"

    def __post_init__(self) -> None:
        if not self.turns or not all(turn.strip() for turn in self.turns):
            raise InputError(f"question {self.id} must have turns that are not empty")
        if self.category in WITH_REFERENCE and len(self.reference) < len(self.turns):
            raise InputError(
                f"question {self.id} is of {self.category}, which is graded beside a reference answer to each of its "
                f"{len(self.turns)} turns, and has {len(self.reference)}; give the file of reference answers"
            )


def read_questions(path: str | os.PathLike[str], references: str | os.PathLike[str] | None = None) -> tuple[MTQuestion, ...]:
    """The questions of a file in FastChat's format, with the references of another.

    Raises:
        InputError: a line that is not what it must be, two questions of one id, or a reference that is missing.
    """
    known: dict[str, tuple[str, ...]] = {}
    for where, row in _rows(references) if references is not None else ():
        choices = _take(row, "choices", list, where)
        if not choices or not isinstance(choices[0], dict):
            raise InputError(f"{where}: 'choices' must hold an answer")
        known[_id(row, where)] = _texts(choices[0], where)
    out: dict[str, MTQuestion] = {}
    for where, row in _rows(path):
        name = _id(row, where)
        if name in out:
            raise InputError(f"{where}: there is a question {name} already")
        category = _take(row, "category", str, where)
        reference = known.get(name, tuple(row["reference"]) if isinstance(row.get("reference"), list) else ())
        out[name] = MTQuestion(name, category, _texts(row, where), reference if category in WITH_REFERENCE else ())
    if not out:
        raise InputError(f"{path} holds no question")
    return tuple(out.values())


def _rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in files.numbered_lines(path, limit=MAX_BYTES, error=InputError):
        try:
            row = files.strict_json(line)
        except Malformed as error:
            raise InputError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: a line must be a JSON object")
        yield where, row


def _take(row: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if not isinstance(row.get(key), kind):
        raise InputError(f"{where}: {key!r} must be a {kind.__name__}, got {files.shown(row.get(key))}")
    return row[key]


def _id(row: Mapping[str, Any], where: str) -> str:
    found = row.get("question_id")
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise InputError(f"{where}: 'question_id' must be a number or a text, got {files.shown(found)}")
    return str(found)


def _texts(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    turns = _take(row, "turns", list, where)
    if not all(isinstance(turn, str) for turn in turns):
        raise InputError(f"{where}: 'turns' must be texts")
    return tuple(turns)


# ---------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class Grade:
    """One answer and what it was given for it."""

    question: str
    category: str
    turn: int
    "1 the first"
    arm: str
    answer: str
    value: float | None
    "1 to 10; None: unscored"
    reason: str


@dataclass(frozen=True)
class MTBench:
    """Grades of both arms, and their means with intervals over questions."""

    overall: Paired
    "the mean over both turns"
    turns: Mapping[str, Paired]
    categories: Mapping[str, Paired]
    n: int
    "questions"
    model: str
    guards: tuple[str, ...]
    "their digests, in order"
    judge: Mapping[str, Any]
    sampling: Sampling
    spent: Spent
    grades: tuple[Grade, ...]

    def __str__(self) -> str:
        return f"MT-Bench, {self.n} questions, 1 to 10: {self.overall}"


def mt_bench(
    model: Backend,
    questions: Sequence[MTQuestion],
    guards: Guard | Sequence[Guard],
    judge: JudgeConfig,
    *,
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    cache: str | os.PathLike[str] | Cache | None = None,
    limit: SpendLimit | Budget | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> MTBench:
    """Answer every question with and without the guards, and have both graded.

    Args:
        guards: one, or several in order.
        store: a journal that answers are kept in as they come, and found again in.
        cache: the file of verdicts; see `JudgeScorer`.
        limit: see `JudgeScorer`.

    Raises:
        InputError: no questions, no guard, or a model inside `guarded`.
        JudgeError: the judge is the model under test, is set up wrongly, or does not answer; what was judged is kept.
        SpendLimitReached: likewise.
    """
    own = (guards,) if isinstance(guards, Guard) else tuple(guards)
    if not questions or not own:
        raise InputError(f"MT-Bench needs questions and a guard, got {len(questions)} and {len(own)}")
    check_grader(judge.model, model.identity.name)
    check_unguarded(model)
    # 1. both arms' answers, turn by turn
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)
        said = {arm: _answers(answers, questions, on, arm) for arm, on in zip(ARMS, ((), own), strict=True)}
    # 2. their grades
    budget = as_budget(limit)
    places = [(arm, q, turn) for arm in ARMS for q in range(len(questions)) for turn in range(len(questions[q].turns))]
    asked = [grade_of(questions[q], said[arm][q], turn) for arm, q, turn in places]
    verdicts = judged(asked, judge, cache=cache, budget=budget, what="MT-Bench, grades by the judge", progress=progress)
    # 3. figures
    grades = [grade(questions[q], turn, arm, said[arm][q][turn], v) for (arm, q, turn), v in zip(places, verdicts, strict=True)]
    return MTBench(
        **figures(grades), n=len(questions), model=model.identity.name, guards=tuple(g.digest for g in own),
        judge=judge.settings, sampling=sampling, spent=budget.spent, grades=tuple(grades),
    )  # fmt: skip


def _answers(answers: Answers, questions: Sequence[MTQuestion], guards: tuple[Guard, ...], arm: str) -> list[list[str]]:
    """One arm's answers, each turn of all questions together."""
    said: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        open_ = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        rows = [Row(conversation(None, dialogue(questions[i], said[i])), guards) for i in open_]
        for i, kept in zip(open_, answers.of(rows, f"MT-Bench, turn {turn + 1}, {arm}"), strict=True):
            said[i].append(kept.text)
    return said


def dialogue(question: MTQuestion, said: Sequence[str]) -> list[str]:
    """What was said so far, and the user's next words: user, assistant, ..., user."""
    turns = [text for pair in zip(question.turns, said, strict=False) for text in pair]
    return [*turns, question.turns[len(said)]]


def grade_of(question: MTQuestion, said: Sequence[str], turn: int) -> Any:
    """What the judge is asked about one turn's answer."""
    turns = [text for pair in zip(question.turns[: turn + 1], said, strict=False) for text in pair]
    return grade_question(turns, question.reference)


def grade(question: MTQuestion, turn: int, arm: str, answer: str, found: Judged) -> Grade:
    value = found.value if isinstance(found.value, float) else None
    return Grade(question.id, question.category, turn + 1, arm, answer, value, found.reason)


def figures(grades: Sequence[Grade]) -> dict[str, Any]:
    """`overall`, `turns` and `categories` of grades: means of both arms and the change, resampled by question."""

    def paired(some: Sequence[Grade]) -> Paired:
        by_arm = {arm: {(g.question, g.turn): g.value for g in some if g.arm == arm} for arm in ARMS}
        cases = list(by_arm[ARMS[0]])
        values = ([by_arm[arm].get(case) for case in cases] for arm in ARMS)
        return Paired.of(*values, groups=[question for question, _ in cases])

    turns = sorted({grade.turn for grade in grades})
    categories = dict.fromkeys(grade.category for grade in grades)
    return {
        "overall": paired(grades),
        "turns": {str(turn): paired([g for g in grades if g.turn == turn]) for turn in turns},
        "categories": {name: paired([g for g in grades if g.category == name]) for name in categories},
    }
