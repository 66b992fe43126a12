"""Many turns: the same scripted user talks with the guarded model and with its unguarded twin, ten turns or twenty.

    result = converse(model, scripts("honesty"), guard, trait=trait, scorer=scorer, turns=20, off_after=10)
    print(result.by_turn["guarded"]["trait"][9])          # the tenth turn, with its interval over scripts

Three arms answer under the misaligned system prompt: `unguarded`, `guarded`, and, with `off_after`, `released`, guarded up
to that turn and unguarded from then on. Each arm goes on from its own answers. Measured turn by turn:

* trait and coherence, by a scorer; None where a script does not ask for a score
* `again`: share of a turn's sentences that say a sentence of an earlier turn again (embedding cosine above 0.8)
* `across`: share of its 4-grams of words that occurred in an earlier turn
* `within`: share of its 4-grams that occurred earlier in the same turn

What a released model keeps is what was said, and nothing else: hf and fake read the whole conversation anew at every turn,
vLLM keeps keys and values under the guards that made them. So what `released` has over `unguarded` after the release is
what the guarded words in its context bring.

It knows backends, scorers and texts.

Source: arXiv 2604.08169 (at least 9 turns; the three repetitions, an unsteered twin beside each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerguard.backends.base import Backend, Sampling
from steerguard.embeddings import available
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.results import Paired
from steerguard.evaluate.scripts import Script
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, repetition, repetition_across
from steerguard.metrics.reading import check_unguarded
from steerguard.metrics.similarity import similarity_across
from steerguard.prompts import conversation
from steerguard.scorers import Scorer
from steerguard.sweeping.answers import Answers, Row

if TYPE_CHECKING:
    from steerguard.fitting import Stage

METRICS = ("trait", "coherence", "again", "across", "within")


@dataclass(frozen=True)
class Said:
    """One answer, and what was measured of it; None is unscored."""

    script: str
    arm: str
    turn: int
    "1 the first"
    guarded: bool
    "whether the guards were on for this answer"
    user: str
    answer: str
    finished: str
    values: Mapping[str, float | None]
    "by metric"


@dataclass(frozen=True)
class Turns:
    """Conversations of all arms, and their figures turn by turn."""

    by_turn: Mapping[str, Mapping[str, tuple[Interval | None, ...]]]
    "arm -> metric -> one interval for each turn, over scripts"
    changes: Mapping[str, tuple[Interval | None, ...]]
    "metric -> guarded - unguarded at each turn, paired by script"
    overall: Mapping[str, Paired]
    "metric -> the mean over all turns, resampled by script"
    drift: Mapping[str, Mapping[str, Interval | None]]
    "arm -> metric -> mean of the last third of the turns less that of the first third, paired by script"
    kept: Mapping[str, Interval | None]
    "metric -> released - unguarded over the turns after the release; empty without one"
    scripts: int
    turns: int
    off_after: int | None
    model: str
    guards: tuple[str, ...]
    "their digests, in order"
    scorer: Mapping[str, Any] | None
    sampling: Sampling
    said: tuple[Said, ...]

    def transcript(self, script: str, arm: str) -> list[tuple[str, str]]:
        """What was said in one conversation: (user, answer) by turn."""
        return [(one.user, one.answer) for one in self.said if (one.script, one.arm) == (script, arm)]


def converse(
    model: Backend,
    users: Sequence[Script],
    guards: Guard | Sequence[Guard],
    *,
    turns: int = 10,
    scorer: Scorer | None = None,
    off_after: int | None = None,
    again: bool | None = None,
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Turns:
    """Hold every conversation in every arm, and measure it.

    Args:
        guards: one, or several in order.
        turns: how many; every script must have as many.
        scorer: of trait and coherence; None: they are unscored.
        off_after: the turn after which the third arm's guards go off; None: no third arm.
        again: whether to embed sentences; by default if the extra `similarity` is installed.
        store: a journal that answers are kept in as they come, and found again in.

    Raises:
        InputError: no script, no guard, a script with too few turns, or a model inside `guarded`.
    """
    own = (guards,) if isinstance(guards, Guard) else tuple(guards)
    _check(users, own, turns, off_after)
    check_unguarded(model)
    on_until = {"unguarded": 0, "guarded": turns} | ({} if off_after is None else {"released": off_after})
    # 1. the conversations, turn by turn, all scripts of an arm together
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)
        held = {arm: _hold(answers, users, own, turns, until, arm) for arm, until in on_until.items()}
    # 2. what is measured of them
    embed = available() if again is None else again
    said = tuple(
        one
        for arm, until in on_until.items()
        for user, talk in zip(users, held[arm], strict=True)
        for one in _measured(user, talk, arm, until, scorer, embed)
    )
    # 3. figures
    return Turns(
        **_figures(said, tuple(on_until), [user.id for user in users], turns, off_after), scripts=len(users), turns=turns,
        off_after=off_after, model=model.identity.name, guards=tuple(guard.digest for guard in own),
        scorer=None if scorer is None else dict(scorer.identity), sampling=sampling, said=said,
    )  # fmt: skip


def _check(users: Sequence[Script], guards: Sequence[Guard], turns: int, off_after: int | None) -> None:
    if not users or not guards or len({user.id for user in users}) < len(users):
        raise InputError(f"conversations need scripts with ids of their own and a guard, got {len(users)} and {len(guards)}")
    short = [user for user in users if len(user.turns) < turns]
    if turns < 1 or short:
        had = f"; the script {short[0].id!r} has {len(short[0].turns)}" if short else ""
        raise InputError(f"{turns} turns were asked for{had}")
    if off_after is not None and not 0 < off_after < turns:
        raise InputError(f"off_after must be a turn before the last of {turns}, got {off_after}")


def _hold(
    answers: Answers, users: Sequence[Script], guards: tuple[Guard, ...], turns: int, until: int, arm: str
) -> list[list[tuple[str, str]]]:
    """One arm's conversations: for each script its answers, each with how it ended."""
    held: list[list[tuple[str, str]]] = [[] for _ in users]
    for turn in range(turns):
        on = guards if turn < until else ()
        rows = [Row(_prompt(user, [text for text, _ in talk]), on) for user, talk in zip(users, held, strict=True)]
        for talk, kept in zip(held, answers.of(rows, f"turn {turn + 1}, {arm}"), strict=True):
            talk.append((kept.text, kept.finished))
    return held


def _prompt(user: Script, said: Sequence[str]) -> Any:
    turns = [text for turn, answer in zip(user.turns, said, strict=False) for text in (turn.user, answer)]
    return conversation(user.negative, [*turns, user.turns[len(said)].user])


def _measured(
    user: Script, talk: Sequence[tuple[str, str]], arm: str, until: int, scorer: Scorer | None, embed: bool
) -> list[Said]:
    texts = [text for text, _ in talk]
    values: dict[str, Sequence[float | None]] = {
        "again": similarity_across(texts) if embed else [None] * len(texts),
        "across": repetition_across(texts),
        "within": [repetition(text) for text in texts],
    }
    scored = [i for i in range(len(texts)) if user.turns[i].scored] if scorer is not None else []
    scores = scorer.scores([user.scenario(texts[:i]) for i in scored], [texts[i] for i in scored]) if scorer else []
    for part in ("trait", "coherence"):
        given = {i: getattr(score, part) for i, score in zip(scored, scores, strict=True)}
        values[part] = [given.get(i) for i in range(len(texts))]
    return [
        Said(user.id, arm, i + 1, i < until, user.turns[i].user, text, finished, {m: values[m][i] for m in METRICS})
        for i, (text, finished) in enumerate(talk)
    ]


# ---------------------------------------------------------------------------------------------------- the figures


def _figures(
    said: Sequence[Said], arms: Sequence[str], users: Sequence[str], turns: int, off_after: int | None
) -> dict[str, Any]:
    cases = {(one.arm, one.script, one.turn): one.values for one in said}

    def values(arm: str, metric: str, some: Sequence[int]) -> list[float | None]:
        """Script by script, and for each turn by turn."""
        return [cases[arm, user, turn][metric] for user in users for turn in some]

    every, third = range(1, turns + 1), max(1, turns // 3)
    early, late = every[:third], every[-third:]
    after = [] if off_after is None else every[off_after:]
    return {
        "by_turn": {
            arm: {m: tuple(bootstrap_interval(values(arm, m, [turn])) for turn in every) for m in METRICS} for arm in arms
        },
        "changes": {
            m: tuple(paired_difference(values("guarded", m, [t]), values("unguarded", m, [t])) for t in every) for m in METRICS
        },
        "overall": {m: Paired.of(*(values(a, m, every) for a in arms[:2]), groups=_each(users, turns)) for m in METRICS},
        "drift": {
            arm: {
                m: paired_difference(*(_by_user(values(arm, m, some), third) for some in (late, early))) for m in METRICS
            }
            for arm in arms
        },
        "kept": {
            m: paired_difference(
                values("released", m, after), values("unguarded", m, after), groups=_each(users, len(after))
            )
            for m in METRICS
            if after
        },
    }  # fmt: skip


def _each(users: Sequence[str], times: int) -> list[str]:
    return [user for user in users for _ in range(times)]


def _by_user(values: Sequence[float | None], size: int) -> list[float | None]:
    """The mean of each script's values; None where none was scored."""
    out: list[float | None] = []
    for start in range(0, len(values), size):
        known = [v for v in values[start : start + size] if v is not None]
        out.append(sum(known) / len(known) if known else None)
    return out
