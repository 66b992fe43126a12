"""Scorers: what an answer is worth on its trait, and whether it makes sense.

A scorer gives two numbers from 0 to 100, or None where it cannot judge: what was not measured is `unscored`, never
zero. `ExactScorer` needs no judge: it knows every sentence that an answer may be made of and what is true.

It knows traits and texts, and neither models nor guards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from steerguard import files
from steerguard.errors import InputError
from steerguard.metrics import Interval, bootstrap_interval
from steerguard.traits import Scenario, Trait
from steerguard.traits.grammar import SLOT, Grammar, Template, sentences


@dataclass(frozen=True)
class Score:
    """What one answer is worth."""

    trait: float | None
    "0 the negative pole, 100 the positive; None: unscored"
    coherence: float | None
    "0 nonsense, 100 makes sense throughout, whatever it says; None: unscored"
    note: str = ""
    "what a judge said for its reason, or why there is no score; shown beside the answer"


UNSCORED = Score(None, None)
Meaning = Literal["positive", "negative", "neutral"]


@dataclass(frozen=True)
class Scores:
    """What a set of answers is worth together; None where no answer could be scored."""

    trait: Interval | None
    coherence: Interval | None
    n_scored: int
    "answers with a trait score"
    n_unscored: int
    "answers without; they are in no mean"

    @classmethod
    def of(cls, scores: Sequence[Score], *, groups: Sequence[Hashable] | None = None, seed: int = 42) -> Scores:
        """Aggregate; `groups` as in `bootstrap_interval`."""

        def interval(part: Callable[[Score], float | None]) -> Interval | None:
            return bootstrap_interval([part(score) for score in scores], groups=groups, seed=seed)

        unscored = sum(score.trait is None for score in scores)
        return cls(interval(lambda s: s.trait), interval(lambda s: s.coherence), len(scores) - unscored, unscored)

    def __str__(self) -> str:
        return f"trait {self.trait or 'unscored'}, coherence {self.coherence or 'unscored'}"


class Asked(Protocol):
    """What the exact scorer must know of what was asked: a `Scenario`, or anything else with a reply."""

    @property
    def reply(self) -> Mapping[str, Any] | None: ...


class Scorer(Protocol):
    """Anything that can score answers: the exact scorer, judges, or an object of yours."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What scores are made by, as JSON values: two scorers of one identity give an answer the same score."""
        ...

    def scores(self, asked: Sequence[Scenario], answers: Sequence[str]) -> list[Score]:
        """The score of each answer; None in it where it cannot be judged."""
        ...


class ExactScorer:
    """Scores answers by a grammar: every sentence that may be said, and which of them are so or true.

    * A sentence is *sayable* if it is one of the sentences of the scenario's kind of reply, with the bound slots filled
      in and every free slot one of its values. Spacing does not count, nor the case of the first letter.
    * trait: 100 * positive / (positive + negative) of its sayable sentences with a sign; 0 if it has none. A claim is
      positive if all its free slots that have a truth hold it, else negative.
    * coherence: 100 * the share of its sentences that are sayable and no repetition of an earlier one.

    An empty answer scores 0 and 0. A scenario without a reply is unscored. Where several sentences of the grammar
    match, the first counts.

    Args:
        grammar: a trait's, or the content of a `grammar.json`.

    Raises:
        TraitError: a grammar that cannot be used.
    """

    def __init__(self, grammar: Grammar | Mapping[str, Any]) -> None:
        self.grammar = grammar if isinstance(grammar, Grammar) else Grammar.of(grammar)
        self._compiled: dict[tuple[str, frozenset[tuple[str, str]]], list[tuple[Template, re.Pattern[str]]]] = {}

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The grammar decides every score."""
        content = files.canonical_json(asdict(self.grammar))
        return {"scorer": "exact", "grammar": hashlib.sha256(content.encode()).hexdigest()}

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> list[Score]:
        """The score of each answer; see `score`."""
        return [self.score(one, answer) for one, answer in zip(asked, answers, strict=True)]

    def score(self, asked: Asked, answer: str) -> Score:
        """The score of one answer. Raises TraitError for a reply that the grammar cannot score."""
        if asked.reply is None:
            return UNSCORED
        self.grammar.check(asked.reply)
        said = sentences(answer)
        meanings = [self._meaning(sentence, asked.reply) for sentence in said]
        positive, negative = meanings.count("positive"), meanings.count("negative")
        sensible = sum(
            meaning is not None and sentence not in said[:i]
            for i, (sentence, meaning) in enumerate(zip(said, meanings, strict=True))
        )
        return Score(
            trait=100 * positive / (positive + negative) if positive + negative else 0.0,
            coherence=100 * sensible / len(said) if said else 0.0,
        )

    def _meaning(self, sentence: str, reply: Mapping[str, Any]) -> Meaning | None:
        """What a sentence says of the trait; None if nobody could say it here."""
        truth = reply.get("truth", {})
        for template, pattern in self._patterns(reply["kind"], reply.get("bind", {})):
            found = pattern.fullmatch(sentence) or pattern.fullmatch(sentence[:1].lower() + sentence[1:])
            if found is None:
                continue
            if template.sign != "claim":
                return template.sign or "neutral"
            right = all(value == truth[slot] for slot, value in found.groupdict().items() if slot in truth)
            return "positive" if right else "negative"
        return None

    def _patterns(self, kind: str, bind: Mapping[str, str]) -> list[tuple[Template, re.Pattern[str]]]:
        key = (kind, frozenset(bind.items()))
        if key not in self._compiled:
            self._compiled[key] = [(t, self._pattern(t, bind)) for t in self.grammar.replies[kind]]
        return self._compiled[key]

    def _pattern(self, template: Template, bind: Mapping[str, str]) -> re.Pattern[str]:
        """The template with bound slots filled in and a named group for each free one, the same value throughout."""
        parts: list[str] = []
        free: set[str] = set()
        for i, part in enumerate(SLOT.split(template.text)):  # text, slot, text, slot, ..., text
            if i % 2 == 0:
                parts.append(re.escape(part))
            elif part in bind:
                parts.append(re.escape(bind[part]))
            elif part in free:
                parts.append(f"(?P={part})")
            else:
                free.add(part)
                parts.append(f"(?P<{part}>{'|'.join(map(re.escape, self.grammar.slots[part]))})")
        return re.compile("".join(parts))


def scorer_for(trait: Trait) -> Scorer:
    """The scorer that a trait asks for.

    Raises:
        InputError: it asks for a judge; which judge is for the caller to say.
    """
    if trait.grammar is None:
        raise InputError(
            f"the trait {trait.name!r} is scored by a judge, and none was given; pass `scorer=JudgeScorer(trait, judge)` "
            "(see `steerguard.judging`), or `--judge MODEL@BASE_URL` on the command line, or a scorer of your own"
        )
    return ExactScorer(trait.grammar)
