"""AlpacaEval: one answer to each instruction, guarded against the same model unguarded, the better chosen by a judge.

    result = alpaca_eval(model, read_instructions("alpaca_eval.json"), guard, judge)
    print(result.length_controlled.win_rate)      # below 50: the guarded model's answers are worse

The instructions are not ours and do not come with steerguard (CC-BY-NC): the file is AlpacaEval's own, or one of yours in
its format, a JSON list of `{"instruction": "...", "dataset": "..."}`; its reference outputs are not used, since the
baseline is the model itself.

Which answer is shown first is drawn from the instruction and the seed; how often the first shown wins is reported. One and
the same text twice is a tie without a judge.

Source: arXiv 2404.04475 for the length-controlled win rate, see `length_control`; the wording of the judge is ours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerguard import files
from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.grading import Judged, as_budget, better_question, check_grader, judged
from steerguard.evaluate.length_control import Gamed, LengthControlled, length_controlled
from steerguard.evaluate.results import ARMS, Paired
from steerguard.files import Malformed, canonical_json
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.judging import Budget, JudgeConfig, SpendLimit, Spent
from steerguard.judging.cache import Cache
from steerguard.metrics import Interval, bootstrap_interval
from steerguard.metrics.reading import check_unguarded
from steerguard.prompts import conversation
from steerguard.sweeping.answers import Answers, Row

if TYPE_CHECKING:
    from steerguard.fitting import Stage

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    number: int
    "its place in the file, 0 the first: what AlpacaEval's difficulties go by"
    text: str
    dataset: str = ""


def read_instructions(path: str | os.PathLike[str]) -> tuple[Instruction, ...]:
    """The instructions of a file in AlpacaEval's format. Raises InputError for anything else."""
    try:
        rows = files.strict_json(files.read_bounded(path, limit=MAX_BYTES, error=InputError))
    except Malformed as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of instructions, got {files.shown(rows)}")
    out = []
    for i, row in enumerate(rows):
        text = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}: entry {i} must be an object with an 'instruction' that is not empty")
        out.append(Instruction(i, text, str(row.get("dataset", ""))))
    return tuple(out)


@dataclass(frozen=True)
class Preference:
    """One instruction's two answers, and which was preferred."""

    instruction: int
    unguarded: str
    guarded: str
    first: str
    "the arm whose answer was shown first"
    value: float | None
    "how far the guarded answer was preferred: 1, 0, or 0.5 for a tie; None: unscored"
    reason: str


@dataclass(frozen=True)
class AlpacaEval:
    """How often the guarded answer is preferred to the unguarded one."""

    win_rate: Interval | None
    "percent, ties as half, with its interval; 50 is no difference"
    length_controlled: LengthControlled | None
    "the same if both answers were equally long"
    characters: Paired
    "length of the answers"
    first_shown: Interval | None
    "percent of the decided comparisons that the answer shown first won: 50 is unbiased"
    n: int
    "instructions"
    same: int
    "of them, both answers one text: ties without a judge"
    unscored: int
    model: str
    guards: tuple[str, ...]
    "their digests, in order"
    judge: Mapping[str, Any]
    sampling: Sampling
    seed: int
    spent: Spent
    preferences: tuple[Preference, ...]

    def __str__(self) -> str:
        controlled = "unscored" if self.length_controlled is None else str(self.length_controlled.win_rate)
        head = f"AlpacaEval, guarded against unguarded, {self.n} instructions"
        return f"{head}: {controlled} % length-controlled, {self.win_rate or 'unscored'} % raw"


def alpaca_eval(
    model: Backend,
    instructions: Sequence[Instruction],
    guards: Guard | Sequence[Guard],
    judge: JudgeConfig,
    *,
    sampling: Sampling = Sampling(),
    gamed: Gamed | None = None,
    seed: int = 42,
    store: Path | None = None,
    cache: str | os.PathLike[str] | Cache | None = None,
    limit: SpendLimit | Budget | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> AlpacaEval:
    """Answer every instruction with and without the guards, and have the better answer chosen.

    Args:
        guards: one, or several in order.
        gamed: AlpacaEval's own data for the length-controlled win rate, from `read_gamed`.
        seed: of which answer is shown first, and of the intervals.
        store, cache, limit: as in `mt_bench`.

    Raises:
        InputError: no instructions, no guard, or a model inside `guarded`.
        JudgeError: the judge is the model under test, is set up wrongly, or does not answer; what was judged is kept.
        SpendLimitReached: likewise.
    """
    own = (guards,) if isinstance(guards, Guard) else tuple(guards)
    if not instructions or not own:
        raise InputError(f"AlpacaEval needs instructions and a guard, got {len(instructions)} and {len(own)}")
    check_grader(judge.model, model.identity.name)
    check_unguarded(model)
    # 1. both arms' answers
    said: dict[str, list[str]] = {}
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)
        for arm, on in zip(ARMS, ((), own), strict=True):
            rows = [Row(conversation(None, [one.text]), on) for one in instructions]
            said[arm] = [kept.text for kept in answers.of(rows, f"AlpacaEval, {arm}")]
    # 2. which is better
    budget = as_budget(limit)
    pairs = list(zip(instructions, said["unguarded"], said["guarded"], strict=True))
    differ = [pair for pair in pairs if not same(*pair[1:])]
    asked = [question_of(one.text, unguarded, guarded, seed) for one, unguarded, guarded in differ]
    verdicts = judged(asked, judge, cache=cache, budget=budget, what="AlpacaEval, choices by the judge", progress=progress)
    by_number = {pair[0].number: verdict for pair, verdict in zip(differ, verdicts, strict=True)}
    found = [preference_of(one, unguarded, guarded, seed, by_number.get(one.number)) for one, unguarded, guarded in pairs]
    # 3. figures
    return AlpacaEval(
        **figures(found, gamed=gamed, seed=seed), n=len(found), model=model.identity.name,
        guards=tuple(g.digest for g in own), judge=judge.settings, sampling=sampling, seed=seed, spent=budget.spent,
        preferences=tuple(found),
    )  # fmt: skip


def same(unguarded: str, guarded: str) -> bool:
    """Whether both answers are one text."""
    return unguarded.strip() == guarded.strip()


def first_shown(instruction: str, seed: int) -> str:
    """The arm whose answer is shown first."""
    return ARMS[hashlib.sha256(canonical_json([seed, instruction]).encode()).digest()[0] % 2]


def question_of(instruction: str, unguarded: str, guarded: str, seed: int) -> Any:
    """What the judge is asked, the answers in their drawn order."""
    order = (unguarded, guarded) if first_shown(instruction, seed) == "unguarded" else (guarded, unguarded)
    return better_question(instruction, *order)


def preference_of(one: Instruction, unguarded: str, guarded: str, seed: int, verdict: Judged | None) -> Preference:
    """What became of one comparison; without a verdict, its two answers are one text."""
    first = first_shown(one.text, seed)
    if verdict is None:
        return Preference(one.number, unguarded, guarded, first, 0.5, "both answers are one and the same text")
    won = {"first": first == "guarded", "second": first != "guarded"}
    value = None if verdict.value is None else 0.5 if verdict.value == "tie" else float(won[str(verdict.value)])
    return Preference(one.number, unguarded, guarded, first, value, verdict.reason)


def figures(found: Sequence[Preference], *, gamed: Gamed | None, seed: int) -> dict[str, Any]:
    """Win rates, lengths and the bias of the order, of comparisons."""
    decided = [100.0 * ((p.value == 1.0) == (p.first == "guarded")) for p in found if p.value in (0.0, 1.0)]
    lengths = [(len(p.unguarded), len(p.guarded)) for p in found]
    values = [p.value for p in found]
    return {
        "win_rate": bootstrap_interval([None if v is None else 100 * v for v in values], seed=seed),
        "length_controlled": length_controlled(
            values, lengths, instructions=[p.instruction for p in found], gamed=gamed, seed=seed
        ),
        "characters": Paired.of([float(a) for a, _ in lengths], [float(b) for _, b in lengths], seed=seed),
        "first_shown": bootstrap_interval(decided, seed=seed),
        "same": sum(same(p.unguarded, p.guarded) for p in found),
        "unscored": sum(v is None for v in values),
    }
