"""Search for a suffix: greedy coordinate descent over tokens, guided by gradients or by nothing.

A step draws candidates, each the present suffix with one token exchanged, and goes to the best of them if it is better. With
gradients the new token is one of those that the loss falls for most steeply, to first order; without, any token: the control that
says what the gradient is worth. Both have the same budget of forward passes: a gradient counts as three.

Only suffixes count that are read back from their text as the same tokens, since text is all that an attacker can send. Every step
is in the journal, with random numbers of its own, so that an interrupted search goes on to the same end.

Source: the idea of gradient-guided token exchange is that of arXiv 2307.15043 (GCG).

It knows token ids, tokenizers and losses. It knows no guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from steerguard.errors import InputError
from steerguard.evaluate.attacks.objective import Objective
from steerguard.journal import Journal
from steerguard.prompts import Message, conversation, render
from steerguard.traits import Scenario

Place = Literal["system", "user"]
Ids = tuple[int, ...]
Allowed = npt.NDArray[np.int64]
GRADIENT = 3
"""Forward passes that a gradient counts as: one forward, and a backward of about twice its work."""
TRIES = 20
"""Draws for each candidate before a step goes on with fewer."""


@dataclass(frozen=True)
class Plan:
    """A suffix attack's budget and aim. Raises InputError for one that cannot be."""

    length: int = 12
    "tokens of the suffix"
    steps: int = 24
    "of all restarts together"
    candidates: int = 32
    "of a step"
    top: int = 48
    "tokens of steepest descent that a position's new token is drawn from"
    gradient: bool = True
    restarts: int = 1
    weight: float = 1.0
    "of projecting as aligned, against saying the target"
    margin: float = 0.0
    "class separations beyond the boundary that tokens should stand at"
    tokens: int = 24
    "of the target"
    place: Place = "system"
    "after the malicious system prompt, or after the user's last words"
    seed: int = 42

    def __post_init__(self) -> None:
        counts = (self.length, self.candidates, self.top, self.restarts, self.tokens)
        if min(counts) < 1 or self.steps < self.restarts or self.weight < 0 or self.place not in get_args(Place):
            raise InputError(
                f"{self}: counts must be at least 1, steps at least as many as restarts, the weight not negative, and the place "
                f"{' or '.join(get_args(Place))}"
            )

    @property
    def evaluations(self) -> int:
        """Forward passes that it may take for one scenario."""
        return self.restarts + self.steps // self.restarts * self.restarts * (self.candidates + GRADIENT)

    def blind(self, restarts: int = 3) -> Plan:
        """The same budget without gradients."""
        return replace(self, gradient=False, restarts=min(restarts, self.steps))


@dataclass(frozen=True)
class Found:
    """The best suffix of a search."""

    text: str
    ids: Ids
    loss: float
    losses: tuple[float, ...]
    "the best so far: at the start, and after every step"
    evaluations: int
    "forward passes for each of the scenarios"


class Slot:
    """A scenario's conversation with room for a suffix."""

    def __init__(self, tokenizer: Any, scenario: Scenario, place: Place) -> None:
        self._tokenizer, self._scenario, self._place = tokenizer, scenario, place
        self._base = render(tokenizer, self.prompt("")).ids
        self._at: int | None = None

    def prompt(self, suffix: str) -> list[Message]:
        """The malicious conversation with that text after it."""
        *turns, last = self._scenario.turns
        if self._place == "user":
            return conversation(self._scenario.negative, [*turns, last + suffix])
        return conversation(self._scenario.negative + suffix, [*turns, last])

    def text(self, ids: Ids) -> str:
        """The text of a suffix."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def reads(self, ids: Ids) -> bool:
        """Whether the suffix's text is read as these tokens, and what is around it as before."""
        found = render(self._tokenizer, self.prompt(self.text(ids))).ids
        if self._at is None:
            at = next((i for i, (a, b) in enumerate(zip(found, self._base, strict=False)) if a != b), len(self._base))
        else:
            at = self._at
        sound = found == (*self._base[:at], *ids, *self._base[at:])
        if sound:
            self._at = at
        return sound

    def around(self) -> tuple[Ids, Ids]:
        """The prompt's tokens before and after the suffix; known once a suffix was read."""
        if self._at is None:
            raise InputError(f"{self._scenario.id}: no suffix has been read back from its text, so its place is not known")
        return self._base[: self._at], self._base[self._at :]


def allowed(tokenizer: Any, vocabulary: int) -> Allowed:
    """The tokens that a suffix may have: ordinary ones with a printable text."""
    special = set(tokenizer.all_special_ids)
    texts = {
        i: tokenizer.decode([i], clean_up_tokenization_spaces=False)
        for i in range(min(vocabulary, len(tokenizer)))
        if i not in special
    }
    found = [i for i, text in texts.items() if text.strip() and text.isprintable() and "\ufffd" not in text]
    if not found:
        raise InputError("the tokenizer has no ordinary token with a printable text: there is nothing to make a suffix of")
    return np.array(found, np.int64)


def start(slots: Sequence[Slot], tokens: Allowed, length: int, rng: np.random.Generator) -> Ids:
    """A suffix drawn by lot that is read back in every conversation; it begins with a space where there are such tokens."""
    spaced = np.array([i for i in tokens if slots[0].text((int(i),)).startswith(" ")], np.int64)
    first = spaced if len(spaced) else tokens
    for _ in range(1000):
        ids = (int(rng.choice(first)), *map(int, rng.choice(tokens, length - 1)))
        if all(slot.reads(ids) for slot in slots):
            return ids
        if rng.random() < 0.5 and len(spaced):  # whole words are read back more often than pieces
            ids = tuple(map(int, rng.choice(spaced, length)))
            if all(slot.reads(ids) for slot in slots):
                return ids
    raise InputError(f"no suffix of {length} tokens was found that this tokenizer reads back from its text; try a shorter one")


def search(
    slots: Sequence[Slot],
    objectives: Sequence[Objective],
    tokens: Allowed,
    plan: Plan,
    begin: Callable[[np.random.Generator], Ids],
    *,
    journal: Journal,
    key: str,
    told: Callable[[int], None] = lambda step: None,
) -> Found:
    """The suffix of least mean loss over the conversations.

    Args:
        begin: the suffix that a restart starts from.
        key: of all that decides the search, but for its random numbers.
        told: called with the number of steps that are done.
    """
    kept: dict[tuple[int, int], Mapping[str, Any]] = {
        (record["restart"], record["step"]): record for record in journal.records if record.get("suffix") == key
    }
    each = plan.steps // plan.restarts
    best: tuple[float, Ids] | None = None
    losses: list[float] = []
    evaluations = 0
    for restart in range(plan.restarts):
        ids: Ids = ()
        loss = np.inf
        for step in range(each + 1):
            record = kept.get((restart, step))
            if record is None:
                rng = np.random.default_rng([plan.seed, restart, step, int(key[:12], 16)])
                if step == 0:
                    ids, cost = begin(rng), 1
                    loss = float(_mean(objectives, [ids])[0])
                else:
                    ids, loss, cost = _step(slots, objectives, tokens, plan, ids, loss, rng)
                record = {"suffix": key, "restart": restart, "step": step, "ids": list(ids), "loss": loss, "cost": cost}
                journal.add(record)
            ids, loss = tuple(record["ids"]), float(record["loss"])
            evaluations += int(record["cost"])
            best = (loss, ids) if best is None or loss < best[0] else best
            losses.append(best[0])
            told(restart * each + step)
    assert best is not None
    return Found(slots[0].text(best[1]), best[1], best[0], tuple(losses), evaluations)


def _step(
    slots: Sequence[Slot], objectives: Sequence[Objective], tokens: Allowed, plan: Plan, ids: Ids, loss: float,
    rng: np.random.Generator,
) -> tuple[Ids, float, int]:  # fmt: skip
    """The suffix after one exchange, its loss, and the forward passes that it took."""
    # 1. what may be exchanged for what
    choice: list[Allowed] = [tokens] * len(ids)
    wanted, cost = plan.candidates + GRADIENT, 0
    if plan.gradient:
        slope = np.sum([objective.scores(ids) for objective in objectives], axis=0)[:, tokens]
        choice = [tokens[order] for order in np.argsort(slope, axis=1)[:, : plan.top]]
        wanted, cost = plan.candidates, GRADIENT
    # 2. candidates that are read back
    drawn: dict[Ids, None] = {}
    for _ in range(TRIES * wanted):
        at = int(rng.integers(len(ids)))
        row = (*ids[:at], int(rng.choice(choice[at])), *ids[at + 1 :])
        if row != ids and row not in drawn and all(slot.reads(row) for slot in slots):
            drawn[row] = None
        if len(drawn) == wanted:
            break
    if not drawn:
        return ids, loss, cost
    # 3. the best of them, if it is better
    found = _mean(objectives, list(drawn))
    at = int(found.argmin())
    if found[at] < loss:
        return list(drawn)[at], float(found[at]), cost + len(drawn)
    return ids, loss, cost + len(drawn)


def _mean(objectives: Sequence[Objective], rows: Sequence[Ids]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.mean([objective.losses(rows) for objective in objectives], axis=0)
    return np.where(np.isnan(found), np.inf, found)
