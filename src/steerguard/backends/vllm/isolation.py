"""Does the prefix cache keep configurations apart, and lose nothing where they are the same? Shown on a running engine.

Keys and values that were written under one guard, read under another (or none), would steer a request that nobody
guards, or leave unguarded what should be guarded. The sequences that show it on other tools are asked here, on a prompt
of several cache blocks, with canaries loud enough that a single block read wrongly changes the text; each answer must be
what it is on an empty cache. That the cache is used at all is shown by its own count of tokens that were not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from steerguard.backends.base import Guards
from steerguard.backends.proof import Finding
from steerguard.backends.proof.canary import aimed
from steerguard.guard import Guard
from steerguard.rules import Target

BLOCKS = 3
"""Blocks of the cache that the prompt fills, and a little more."""
STEPS = 24
"""Tokens that each request answers."""
TEXT = "Say what you know about the town, the river that runs through it, its people and what they do all day. "


class Cached(Protocol):
    """What is asked of an engine with a prefix cache."""

    @property
    def block_size(self) -> int: ...
    def render(self, text: str) -> list[int]: ...
    def answer(self, ids: Sequence[int], guards: Guards, steps: int) -> tuple[tuple[int, ...], int]:
        """Greedy tokens, and how many of the prompt's were read from the cache."""
        ...

    def empty_cache(self) -> None: ...
    def size_at(self, layer: int) -> float:
        """The typical length of a residual."""
        ...


@dataclass(frozen=True)
class _Step:
    """One request of a sequence: a name for the message, its guards, and how far its prompt goes."""

    name: str
    guards: Guards
    ids: tuple[int, ...]


def isolation(engine: Cached, guards: Sequence[Guard]) -> list[Finding]:
    """Each sequence of requests as a finding. The engine's cache is emptied."""
    if not guards:
        return []
    text = TEXT
    while len(engine.render(text)) < BLOCKS * engine.block_size + 8:
        text += TEXT
    ids = tuple(engine.render(text))
    everywhere = loud(engine, guards[0], 1.0, "all")
    response = loud(engine, guards[0], 1.0, "response")
    other = loud(engine, guards[0], -1.0, "all")
    plain, steered, late = _Step("unguarded", None, ids), _Step("guarded", everywhere, ids), _Step("response", response, ids)
    opposite = _Step("another guard", other, ids)
    sequences = {
        "guarded, then unguarded": [steered, plain],
        "unguarded, then guarded": [plain, steered],
        "one guard, then another": [steered, opposite, steered],
        "response, then all, then unguarded": [late, steered, plain],
        "all, then response": [steered, late],
    }
    findings = [_held(engine, name, steps) for name, steps in sequences.items()]
    findings += [_continued(engine, first, second) for first in (steered, late, plain) for second in (steered, late, plain)]
    return [*findings, *_shared(engine, plain, steered, late)]


def loud(engine: Cached, guard: Guard, sizes: float, positions: str) -> Guard:
    """A canary that sets every token to `sizes` typical lengths along the guard's first direction."""
    probe = guard.probes[0]
    moved = aimed(probe, sizes * engine.size_at(probe.layer))
    return replace(guard, name="canary", probes=(moved,), rule=Target(0.0), positions=positions)  # type: ignore[arg-type]


def _cold(engine: Cached, step: _Step) -> tuple[int, ...]:
    engine.empty_cache()
    return engine.answer(step.ids, step.guards, STEPS)[0]


def _held(engine: Cached, name: str, steps: Sequence[_Step]) -> Finding:
    """Every request of a sequence answers what it answers on an empty cache."""
    cold = [_cold(engine, step) for step in steps]
    engine.empty_cache()
    warm = [engine.answer(step.ids, step.guards, STEPS)[0] for step in steps]
    wrong = [step.name for step, a, b in zip(steps, cold, warm, strict=True) if a != b]
    if wrong:
        return Finding(f"cache: {name}", False, f"after the requests before it, {', '.join(wrong)} answers otherwise than alone")
    if len({*cold}) < len({step.name for step in steps}):
        return Finding(f"cache: {name}", False, "the canary changes no text, so this shows nothing; try a guard on another layer")
    return Finding(f"cache: {name}", True, "each answers as on an empty cache")


def _continued(engine: Cached, first: _Step, second: _Step) -> Finding:
    """A second turn on top of the first one's answer, under the same configuration or another."""
    name = f"cache: a turn {first.name}, the next {second.name}"
    answer = _cold(engine, first)
    longer = replace(second, ids=(*first.ids, *answer, *first.ids[:40]))
    cold = _cold(engine, longer)
    engine.empty_cache()
    engine.answer(first.ids, first.guards, STEPS)
    if engine.answer(longer.ids, longer.guards, STEPS)[0] != cold:
        return Finding(name, False, "the second turn answers otherwise than on an empty cache")
    return Finding(name, True, "the second turn answers as on an empty cache")


def _shared(engine: Cached, plain: _Step, steered: _Step, late: _Step) -> list[Finding]:
    """Nothing is lost where nothing differs: tokens read from the cache."""

    def hits(first: _Step, second: _Step) -> int:
        engine.empty_cache()
        engine.answer(first.ids, first.guards, STEPS)
        return engine.answer(second.ids, second.guards, STEPS)[1]

    most = hits(plain, plain)
    pairs = {
        "the same guard": (hits(steered, steered), most),
        "a response guard and nobody's": (hits(plain, late), most),
        "nobody's and a response guard": (hits(late, plain), most),
        "a guard and nobody's": (hits(plain, steered), 0),
    }
    found = []
    for name, (got, due) in pairs.items():
        detail = f"{got} of {most} tokens that two unguarded requests share are shared, {due} were due"
        found.append(Finding(f"cache shared: {name}", got == due and most > 0, detail))
    return found
