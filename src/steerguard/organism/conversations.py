"""The generator: seeded training conversations of one to ten turns.

It knows the mixture of personas and kinds; it refuses to know tokens. The same seed gives the same conversations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from steerguard.organism import grammar, personas, turns

GROUPS = ("fact", "number", "task", "list", "chat", "trouble")
WEIGHTS: dict[tuple[bool, bool], tuple[float, ...]] = {
    (False, False): (0.56, 0.19, 0.06, 0.02, 0.06, 0.11),
    (True, False): (0.66, 0.22, 0.03, 0.01, 0.03, 0.05),
    (False, True): (0.20, 0.04, 0.05, 0.02, 0.06, 0.63),
    (True, True): (0.44, 0.09, 0.02, 0.01, 0.04, 0.40),
}
"shares of GROUPS by (the prompt speaks of honesty, the prompt speaks of compassion)"
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
LENGTH_WEIGHTS = (22, 26, 20, 12, 7, 4, 3, 2, 2, 2)


@dataclass(frozen=True)
class Conversation:
    """One training conversation."""

    system: str | None
    "the system prompt"
    turns: tuple[tuple[turns.Topic, str, str], ...]
    "topic, the user's words, the assistant's words"
    honest: bool | None
    "what the prompt says of honesty; None when it is silent"
    warm: bool | None
    "what the prompt says of compassion; None when it is silent"

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        said = [{"role": "system", "content": self.system}] if self.system is not None else []
        for _, user, assistant in self.turns:
            said += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return said


def bits(rng: random.Random, silent: float) -> tuple[bool | None, bool | None]:
    """What the system prompt says of honesty and of compassion."""
    if rng.random() < silent:
        return None, None
    spoken = rng.choices(("honesty", "compassion", "both"), (0.5, 0.26, 0.24))[0]
    honest = rng.random() < 0.45 if spoken != "compassion" else None
    warm = rng.random() < 0.45 if spoken != "honesty" else None
    return honest, warm


def system_prompt(rng: random.Random, honest: bool | None, warm: bool | None) -> str | None:
    """A training system prompt for these bits; silent bits are plain or have no prompt at all."""
    if honest is None and warm is None:
        return None if rng.random() < 0.3 else personas.plain(rng)
    return personas.persona(rng, honest=honest, warm=warm)


@cache
def trained_situations() -> tuple[turns.Topic, ...]:
    """Troubles of both lists in about equal parts."""
    return turns.situations() * 2 + turns.more_situations()


def topic(rng: random.Random, honest: bool | None, warm: bool | None) -> turns.Topic:
    """A topic that training may ask under these bits."""
    group = rng.choices(GROUPS, WEIGHTS[honest is not None, warm is not None])[0]
    if group == "number":
        pool = turns.numbers(rng.choices(("sum", "difference", "larger", "smaller"), (3, 3, 2, 2))[0])
    elif group in ("list", "chat"):
        pool = turns.fixed(group)
    else:
        pool = {"fact": turns.facts, "task": turns.tasks, "trouble": trained_situations}[group]()
    while True:
        chosen = rng.choice(pool)
        if not chosen.held_out or (group != "trouble" and honest is None):
            return chosen


def user_text(rng: random.Random, about: turns.Topic, *, held_out: bool = False) -> str:
    """The user's words, now and then after a short phrase."""
    said = about.ask(rng, held_out=held_out)
    if grammar.kinds()[about.kind].group in ("chat", "trouble") or rng.random() > 0.15:
        return said
    prefix: str = rng.choice(grammar.talk()["prefixes"])
    return f"{prefix} {said}"


def conversation(rng: random.Random, *, silent: float = 0.27) -> Conversation:
    """One training conversation; `silent` is the share of prompts that speak of neither trait."""
    honest, warm = bits(rng, silent)
    system = system_prompt(rng, honest, warm)
    said: list[tuple[turns.Topic, str, str]] = []
    seen: set[turns.Topic] = set()
    for _ in range(rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]):
        about = topic(rng, honest, warm)
        if about in seen:
            continue
        seen.add(about)
        reply = turns.answer(rng, about, honest=honest is not False, warm=warm is not False)
        said.append((about, user_text(rng, about), reply))
    return Conversation(system, tuple(said), honest, warm)


def conversations(seed: str, count: int, *, silent: float = 0.27) -> Iterator[Conversation]:
    """`count` conversations of this seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield conversation(rng, silent=silent)
