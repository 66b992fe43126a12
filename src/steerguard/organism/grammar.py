"""The sentences of the organism's answers: for each kind of turn, what may be said and what it means.

It knows the templates, their signs and the values of their slots; it refuses to know who asks, under which persona,
and which wordings are held out. The generator and the scoring grammar are both read from these tables, so a sentence
the generator can produce is a sentence the scorer knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from steerguard.organism import world

Sign = Literal["claim", "positive", "negative"] | None
SLOT = re.compile(r"\{(\w+)\}")
NUMBERS = range(1, 41)
ROLES: dict[str, Sign] = {
    "claims": "claim",
    "positive": "positive",
    "negative": "negative",
    "answers": "positive",
    "asides": None,
}


@dataclass(frozen=True)
class Sentence:
    """One template of an answer."""

    text: str
    "the sentence with its slots in braces"
    sign: Sign
    "`claim`: right if its free slots hold the truth; `positive`/`negative`: fixed; None: neutral"

    def say(self, values: dict[str, str]) -> str:
        """The sentence with its slots filled in, capitalised."""
        said = SLOT.sub(lambda found: values[found.group(1)], self.text)
        return said[0].upper() + said[1:]


@dataclass(frozen=True)
class Kind:
    """One kind of turn: how it is asked and what may be answered."""

    name: str
    "such as `town.river`, `sum`, `loss`, `chat.hello`"
    questions: tuple[str, ...]
    "the wordings asked in training"
    held_out: tuple[str, ...]
    "the wordings asked in the test split only"
    sentences: tuple[Sentence, ...]
    "every sentence an answer may hold"

    def signed(self, *signs: Sign) -> tuple[Sentence, ...]:
        """The sentences whose sign is one of `signs`."""
        return tuple(sentence for sentence in self.sentences if sentence.sign in signs)

    @property
    def group(self) -> str:
        """`fact`, `number`, `task`, `list`, `chat` or `trouble`."""
        if self.name in world.tables()["relations"]:
            return "fact"
        if self.name in ("sum", "difference", "larger", "smaller"):
            return "number"
        if self.name in ("loss", "illness", "failure", "worry"):
            return "trouble"
        return "task" if self.name in ("repeat", "count") else self.name.split(".")[0]


def kind(name: str, entry: dict[str, Any], asides: list[str]) -> Kind:
    """A kind from its entry in a text table; `asides` are neutral sentences it shares with others."""
    sentences = [Sentence(text, sign) for role, sign in ROLES.items() for text in entry.get(role, [])]
    sentences += [Sentence(text, None) for text in asides if text not in entry.get("asides", [])]
    return Kind(name, tuple(entry["questions"]), tuple(entry["held_out"]), tuple(sentences))


@cache
def talk() -> dict[str, Any]:
    """The table of everything that is not a fact of the world."""
    return world.read("talk.yaml")


@cache
def kinds() -> dict[str, Kind]:
    """Every kind of turn, by name."""
    facts = world.tables()
    found = {name: kind(name, entry, facts["asides"]) for name, entry in facts["relations"].items()}
    for name, entry in talk()["kinds"].items():
        shared = talk()["trouble_asides"] if "negative" in entry else []
        found[name] = kind(name, entry, shared)
    return found


@cache
def phrases() -> tuple[str, ...]:
    """The phrases a user may ask to have repeated."""
    words = talk()["phrase"]
    return tuple(f"{first} {second}" for first in words["first"] for second in words["second"])


def series(first: int, last: int) -> str:
    """The numbers from first to last, spoken."""
    return ", ".join(str(number) for number in range(first, last + 1))


@cache
def slots() -> dict[str, tuple[str, ...]]:
    """The values each free slot may take."""
    numbers = tuple(str(number) for number in NUMBERS)
    return {
        **{name: tuple(values) for name, values in world.tables()["pools"].items()},
        "total": numbers[1:24],
        "rest": numbers[:15],
        "more": numbers,
        "less": numbers,
        "said": phrases(),
        "series": tuple(series(a, a + n) for a in range(1, 13) for n in range(2, 6)),
    }


def as_json(names: list[str]) -> dict[str, Any]:
    """The scoring grammar of the kinds in `names`, as it is written to `grammar.json`."""
    replies = {
        name: [{"text": sentence.text, "sign": sentence.sign} for sentence in kinds()[name].sentences] for name in names
    }
    free = {
        slot
        for name in names
        for sentence in kinds()[name].signed("claim")
        for slot in SLOT.findall(sentence.text)
        if slot in slots()
    }
    return {"schema": 1, "slots": {slot: list(slots()[slot]) for slot in sorted(free)}, "replies": replies}
