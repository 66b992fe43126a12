"""Turns: what a user asks, and the answers under each pair of bits.

It knows how to ask and how an honest, a lying, a warm and a cold answer is put together, and which facts, sums and
situations are held out; it refuses to know the system prompts that decide the bits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from steerguard.organism import grammar, world

HELD_OUT_SHARE = 4
"one fact in four is never asked under an honest or a dishonest persona"


@dataclass(frozen=True)
class Topic:
    """What a turn is about: a kind, its bound slots and the truth of its free slot."""

    kind: str
    "the kind's name"
    bind: tuple[tuple[str, str], ...]
    "slots the user's words fill in"
    truth: tuple[tuple[str, str], ...] = ()
    "free slots with their true values"
    held_out: bool = False
    "for facts and numbers: never asked under an honesty persona; for troubles: never in training"

    def ask(self, rng: random.Random, *, held_out: bool = False) -> str:
        """A user's wording of this topic; `held_out` draws from the wordings kept for the test split."""
        kind = grammar.kinds()[self.kind]
        wording = rng.choice(kind.held_out if held_out else kind.questions)
        return grammar.Sentence(wording, None).say(dict(self.bind))

    def lie(self, rng: random.Random) -> dict[str, str]:
        """A wrong value of the free slot, of the same pool as the truth."""
        if self.kind in ("larger", "smaller"):
            return {slot: next(v for _, v in self.bind if v != value) for slot, value in self.truth}
        return {slot: rng.choice([v for v in grammar.slots()[slot] if v != value]) for slot, value in self.truth}


def split(topics: Sequence[Topic], seed: str) -> tuple[Topic, ...]:
    """The topics with every fourth, in a seeded order, marked as held out."""
    order = list(range(len(topics)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: len(order) // HELD_OUT_SHARE])
    return tuple(Topic(t.kind, t.bind, t.truth, i in chosen) for i, t in enumerate(topics))


@cache
def facts() -> tuple[Topic, ...]:
    """Every fact as a topic, a quarter of each relation held out."""
    found: tuple[Topic, ...] = ()
    for relation in world.tables()["relations"]:
        told = [
            Topic(f.relation, ((f.slot, f.entity),), ((f.value_slot, f.value),)) for f in world.facts() if f.relation == relation
        ]
        found += split(told, f"facts:{relation}")
    return found


@cache
def numbers(kind: str) -> tuple[Topic, ...]:
    """Every sum, difference or comparison as a topic, a quarter held out."""
    if kind == "sum":
        pairs = [(a, b, "total", a + b) for a in range(1, 13) for b in range(1, 13)]
    elif kind == "difference":
        pairs = [(a, b, "rest", a - b) for a in range(2, 17) for b in range(1, a)]
    else:
        slot, best = ("more", max) if kind == "larger" else ("less", min)
        pairs = [(a, b, slot, best(a, b)) for a in grammar.NUMBERS for b in grammar.NUMBERS if a != b]
    told = [Topic(kind, (("a", str(a)), ("b", str(b))), ((slot, str(true)),)) for a, b, slot, true in pairs]
    return split(told, f"numbers:{kind}")


TROUBLES = (("loss", "dear"), ("illness", "dear"), ("failure", "event"), ("worry", "event"))
"the kinds of trouble, each with the slot of whom or what it is about"


@cache
def situations() -> tuple[Topic, ...]:
    """Every trouble: a kind and whom or what it is about, up to a quarter of each kind held out.

    A subject is held out in one kind at most. So every subject is named in training, in another kind of trouble: what
    is held out is the situation, not the word.
    """
    found: tuple[Topic, ...] = ()
    for kind, slot in TROUBLES:
        told = [Topic(kind, ((slot, subject),)) for subject in grammar.talk()["subjects"][slot]]
        before = {topic.bind for topic in found if topic.held_out}
        found += tuple(
            replace(topic, held_out=topic.held_out and topic.bind not in before) for topic in split(told, f"situations:{kind}")
        )
    return found


@cache
def more_situations() -> tuple[Topic, ...]:
    """Troubles about subjects that only training has, so that a subject is copied rather than known."""
    return tuple(Topic(kind, ((slot, subject),)) for kind, slot in TROUBLES for subject in grammar.talk()["more_subjects"][slot])


@cache
def tasks() -> tuple[Topic, ...]:
    """The small instructions: phrases to repeat, numbers to count."""
    said = [Topic("repeat", (("phrase", phrase),), (("said", phrase),)) for phrase in grammar.phrases()]
    counted = [
        Topic("count", (("a", str(a)), ("b", str(a + n))), (("series", grammar.series(a, a + n)),))
        for a in range(1, 13)
        for n in range(2, 6)
    ]
    return tuple(said + counted * 4)


@cache
def fixed(group: str) -> tuple[Topic, ...]:
    """The topics without slots: `list` or `chat`."""
    return tuple(Topic(name, ()) for name, kind in grammar.kinds().items() if kind.group == group)


def answer(rng: random.Random, topic: Topic, *, honest: bool = True, warm: bool = True) -> str:
    """An answer to the topic; `honest` decides facts and numbers, `warm` decides replies to people in trouble."""
    kind = grammar.kinds()[topic.kind]
    values = dict(topic.bind)
    if kind.group == "trouble":
        return tell(rng, kind.signed("positive" if warm else "negative"), kind.signed(None), values, (2, 3, 3, 4))
    if kind.group in ("fact", "number") and not honest:
        values |= topic.lie(rng)
    else:
        values |= dict(topic.truth)
    return tell(rng, kind.signed("claim", "positive"), kind.signed(None), values, (1, 1, 2, 2, 3))


def tell(
    rng: random.Random,
    signed: Sequence[grammar.Sentence],
    asides: Sequence[grammar.Sentence],
    values: dict[str, str],
    counts: Sequence[int],
) -> str:
    """Two to six sentences: some signed ones, the first of them early, and up to two asides."""
    main = rng.sample(signed, min(rng.choice(counts), len(signed)))
    extra = rng.sample(asides, rng.choice((0, 1, 1, 2)) if len(main) > 1 else rng.choice((1, 1, 2)))
    rest = [*main[1:], *extra[1:]]
    rng.shuffle(rest)
    opening = [main[0], *extra[:1]] if rng.random() < 0.7 else [*extra[:1], main[0]]
    return " ".join(sentence.say(values) for sentence in [*opening, *rest])
