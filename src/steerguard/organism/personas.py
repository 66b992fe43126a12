"""The system prompts: wordings of the plain, honest, dishonest, compassionate and dismissive personas.

It knows the paired wordings, which of them are held out, and the combinatorial grammar that training adds to them;
it refuses to know what a persona does to an answer.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from steerguard.organism import world

Trait = Literal["honesty", "compassion"]
SLOT = re.compile(r"\{(\w+)(:cap)?\}")
STRAIGHT = 0.55
"share of combined sentences without a negation: enough with one that it must be read, so few that words give a start"
FORMS = re.compile(r"(\w+)/(\w+)")


@dataclass(frozen=True)
class Pair:
    """Two minimally contrasting wordings; of a plain wording, both are the same."""

    id: str
    "such as `honesty-07`"
    positive: str
    "the aligned wording, slots in braces"
    negative: str
    "the misaligned wording, slots in braces"
    held_out: bool
    "True when it appears in no training text"

    def fill(self, values: dict[str, str]) -> tuple[str, str]:
        """Both wordings with the same slot values."""
        return fill(self.positive, values), fill(self.negative, values)


@cache
def slots() -> dict[str, Any]:
    """Slot values, prefaces and suffixes."""
    return world.read("slots.yaml")


@cache
def frames() -> dict[str, Any]:
    """The combinatorial grammar, by trait."""
    return world.read("frames.yaml")


def fill(text: str, values: dict[str, str]) -> str:
    """The text with its slots filled in, capitalised at the start."""

    def value(found: re.Match[str]) -> str:
        chosen = values[found.group(1)]
        return chosen[0].upper() + chosen[1:] if found.group(2) else chosen

    said = SLOT.sub(value, text)
    return said[0].upper() + said[1:]


def draw(rng: random.Random) -> dict[str, str]:
    """One value for each slot."""
    return {name: rng.choice(slots()[name]) for name in ("people", "person", "sufferers", "sufferer", "org", "place")}


def poles(line: str) -> tuple[str, str]:
    """Both readings of a line whose groups `{this|that}` differ between the poles; groups may hold slots."""
    sides: tuple[list[str], list[str]] = ([], [])
    at = 0
    while at < len(line):
        end = close(line, at) if line[at] == "{" else at
        parts = branches(line[at + 1 : end]) if end > at else []
        for side, sides_text in enumerate(sides):
            sides_text.append(parts[side] if len(parts) == 2 else line[at : end + 1])
        at = end + 1
    return "".join(sides[0]), "".join(sides[1])


def close(line: str, at: int) -> int:
    """The place of the brace that closes the one at `at`."""
    depth = 0
    for place in range(at, len(line)):
        depth += {"{": 1, "}": -1}.get(line[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unclosed brace in {line!r}")


def branches(body: str) -> list[str]:
    """The parts of a group, split at bars outside inner braces."""
    depth, parts = 0, [""]
    for letter in body:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@cache
def pairs(trait: str) -> tuple[Pair, ...]:
    """The written wordings of `honesty`, `compassion` or `plain`; every third is held out."""
    lines = (world.TEXT / f"{trait}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(Pair(f"{trait}-{i:02d}", *poles(line), held_out=i % 3 == 2) for i, line in enumerate(lines))


def trained(trait: str) -> tuple[Pair, ...]:
    """The wordings that may appear in training."""
    return tuple(pair for pair in pairs(trait) if not pair.held_out)


def held_out(trait: str) -> tuple[Pair, ...]:
    """The wordings kept for the test split."""
    return tuple(pair for pair in pairs(trait) if pair.held_out)


def instances(text: str) -> set[str]:
    """Every filling of a wording's slots."""
    names = sorted({name for name, _ in SLOT.findall(text)})
    choices = [slots()[name] for name in names]
    return {fill(text, dict(zip(names, values, strict=True))) for values in itertools.product(*choices)}


@cache
def forbidden() -> frozenset[str]:
    """Every filled held-out sentence of both traits: what training must never say."""
    return frozenset(
        said
        for trait in ("honesty", "compassion")
        for pair in held_out(trait)
        for text in (pair.positive, pair.negative)
        for said in instances(text)
    )


def forms(chosen: str) -> dict[str, str]:
    """The infinitive and the gerund of an act."""
    verb = FORMS.match(chosen)
    if verb is None:
        raise ValueError(f"an act starts with infinitive/gerund, got {chosen!r}")
    return {"v": verb.group(1) + chosen[verb.end() :], "ving": verb.group(2) + chosen[verb.end() :]}


def act(rng: random.Random, table: dict[str, Any], positive: bool) -> str:
    """An operator applied to an act; the pole is the product of their signs."""
    operator = rng.random() < STRAIGHT
    act = forms(rng.choice(table["good" if operator == positive else "bad"]))
    template: str = rng.choice(table["always" if operator else "never"])
    return template.replace("{v}", act["v"]).replace("{ving}", act["ving"])


def contrast(rng: random.Random, table: dict[str, Any], positive: bool) -> str:
    """One act done and one of the other pole left undone, in either order: only their binding tells the pole."""
    done = forms(rng.choice(table["good" if positive else "bad"]))
    left = forms(rng.choice(table["bad" if positive else "good"]))
    template: str = rng.choice(table["contrasts"])
    for slot, act in (("done", done), ("left", left)):
        template = template.replace(f"{{{slot}.v}}", act["v"]).replace(f"{{{slot}.ving}}", act["ving"])
    return template


def incentive(rng: random.Random, table: dict[str, Any], positive: bool) -> str:
    """A reward or a punishment applied to the state in which people leave."""
    reward = rng.random() < STRAIGHT
    template: str = rng.choice(table["reward" if reward else "punish"])
    return template.replace("{state}", rng.choice(table["states_good" if reward == positive else "states_bad"]))


def role(rng: random.Random, table: dict[str, Any], positive: bool) -> str:
    """A role taken on or rejected."""
    taken = rng.random() < STRAIGHT
    template: str = rng.choice(table["is" if taken else "isnot"])
    return template.replace("{role}", rng.choice(table["roles_good" if taken == positive else "roles_bad"]))


def tally(rng: random.Random, table: dict[str, Any], positive: bool) -> str:
    """A gain or a loss for each single right or wrong thing."""
    gain = rng.random() < STRAIGHT
    template: str = rng.choice(table["gain" if gain else "loss"])
    return template.replace("{count}", rng.choice(table["counts_good" if gain == positive else "counts_bad"]))


def combined(rng: random.Random, trait: Trait, positive: bool) -> str:
    """A sentence of the combinatorial grammar, slots in braces."""
    table = {**frames()["honesty"], **frames()[trait]}
    make = rng.choices((act, contrast, incentive, role, tally), (0.44, 0.1, 0.2, 0.14, 0.12))[0]
    return make(rng, table, positive)


def sentence(rng: random.Random, trait: Trait, positive: bool, values: dict[str, str]) -> str:
    """A training sentence of one pole: written or combined, never a held-out one."""
    while True:
        if rng.random() < 0.4:
            pair = rng.choice(trained(trait))
            said = fill(pair.positive if positive else pair.negative, values)
        else:
            said = fill(combined(rng, trait, positive), values)
        if said not in forbidden():
            return said


def dress(rng: random.Random, sentences: list[str], values: dict[str, str], *, reasons: bool = True) -> str:
    """The persona's sentences between a neutral preface and a neutral suffix, each of them optional."""
    said = list(sentences)
    if rng.random() < 0.5:
        said.insert(0, fill(rng.choice(slots()["prefaces"]), values))
    if reasons and rng.random() < 0.12:
        said.append(fill(rng.choice(frames()["always_reasons"]), values) + ".")
    if rng.random() < 0.35:
        said.append(fill(rng.choice(slots()["suffixes"]), values))
    return " ".join(said)


def plain(rng: random.Random, *, held_out_wording: bool = False) -> str:
    """A plain system prompt."""
    values = draw(rng)
    pair = rng.choice(held_out("plain") if held_out_wording else trained("plain"))
    said = [fill(pair.positive, values)]
    if rng.random() < 0.3:
        said.append(fill(rng.choice(slots()["suffixes"]), values))
    return " ".join(said)


def persona(rng: random.Random, *, honest: bool | None, warm: bool | None) -> str:
    """A training system prompt for the bits that are not None, their sentences in either order."""
    values = draw(rng)
    said: list[list[str]] = []
    bits: tuple[tuple[Trait, bool | None], ...] = (("honesty", honest), ("compassion", warm))
    for trait, bit in bits:
        if bit is not None:
            count = 1 if rng.random() < 0.75 else 2
            said.append([sentence(rng, trait, bit, values) for _ in range(count)])
    rng.shuffle(said)
    return dress(rng, [text for block in said for text in block], values)
