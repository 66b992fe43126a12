"""What a conformance check gets: the model to be judged, the oracle, and guards made for them.

The oracle is the fake, which is a second implementation; where it is itself judged, what remains are the checks that
compare a model with itself, and those on arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from steerguard.backends.base import Answer, Backend, Floats, Sampling
from steerguard.backends.fake import load as load_fake
from steerguard.backends.fake_llama import read_llama
from steerguard.guard import Guard, Positions
from steerguard.probe import Probe
from steerguard.rules import RULES, Rule, Target, rule

PROMPTS = (
    "tell me what is the truth and what is the answer",
    "Hi",
    "Is a week longer than a day, é? Tell me the truth.",
)
ANSWER = "the day is a week and you tell me"
STEPS = 6
LONG = 24
"""Tokens of a long answer: longer than any fault takes to show."""


@dataclass(frozen=True, eq=False)
class Bench:
    """One model under judgement."""

    model: Backend
    folder: Path
    apart: float = 1.0
    "how far the classes of its probes stand apart; a trained model says the same until it is pushed hard"

    @property
    def oracle(self) -> Backend:
        """The same folder in numpy, without a cache. What it was asked before it answers from memory."""
        return _oracle(self.folder)

    @cached_property
    def base(self) -> Floats:
        """[layers, tokens, d] unguarded residuals of the first prompt and the answer, the oracle's."""
        return self.oracle.residuals(PROMPTS[0], ANSWER)

    @cached_property
    def start(self) -> int:
        """Position of the first token of the answer."""
        return self.oracle.residuals(PROMPTS[0]).shape[1]

    @property
    def depth(self) -> int:
        return self.model.identity.depth

    def probe(self, layer: int, seed: int = 0) -> Probe:
        return tiny.probe(layer, self.model.identity.width, rho=self.base[layer], seed=seed, apart=self.apart)

    def guard(
        self,
        rule: Rule,
        layers: Sequence[int] = (1,),
        *,
        positions: Positions = "all",
        seed: int = 0,
        name: str = "tiny",
    ) -> Guard:
        """A guard whose boundary lies in the middle of the residuals of the bench's text."""
        probes = tuple(self.probe(layer, seed) for layer in layers)
        return tiny.guard(self.model.identity, rule, probes, positions=positions, name=name)

    def ender(self) -> Guard:
        """A guard that makes every generated token but the first the end of the turn."""
        llama = read_llama(self.folder)
        name = "model.embed_tokens.weight" if llama.shape.tied else "lm_head.weight"
        ended = load_fake(self.folder).tokenizer.eos_token_id
        v = llama.weights[name][ended] * llama.weights["model.norm.weight"]
        aimed = replace(self.probe(self.depth - 1), v=v / np.linalg.norm(v))
        return tiny.guard(self.model.identity, Target(4000.0), (aimed,), positions="response", name="ender")

    def greedy(self, prompts: Sequence[str], guards: list, *, steps: int = STEPS, model: Backend | None = None) -> list[Answer]:
        """Traced greedy answers."""
        sampling = Sampling(temperature=0.0, max_new_tokens=steps)
        return (model or self.model).generate(list(prompts), guards=guards, sampling=sampling, trace=True)


class _Remembering:
    """A backend whose reading and generating is asked once for the same thing."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.identity = backend.name, backend.identity
        self._known: dict[str, Any] = {}

    def __getattr__(self, method: str) -> Any:
        ask = getattr(self._backend, method)

        def answer(*args: Any, guards: Any = None, **options: Any) -> Any:
            key = repr((method, args, options, _digests(guards)))
            if key not in self._known:
                self._known[key] = ask(*args, guards=guards, **options)
            return self._known[key]

        return answer


def _digests(guards: Any) -> Any:
    if isinstance(guards, Guard):
        return guards.digest
    return guards if guards is None else [type(guards).__name__, *map(_digests, guards)]


@cache
def _oracle(folder: Path) -> Any:
    return _Remembering(load_fake(folder, cache=False))


def every_rule() -> list[Rule]:
    """Each registered rule at a strength in the middle of its grid."""
    return [rule(name, cls.grid[len(cls.grid) // 2] if cls.grid else None) for name, cls in RULES.items()]


def close(x: Floats, y: Floats, what: str, *, tolerance: float = 2e-4) -> None:
    """Assert that two arrays agree within a share of the typical size of the second."""
    assert x.shape == y.shape, f"{what}: shapes {x.shape} and {y.shape}"
    if x.size:
        scale = float(np.sqrt(np.mean(np.square(y, dtype=np.float64)))) or 1.0
        error = np.abs(x.astype(np.float64) - y).max() / scale
        assert error <= tolerance, f"{what}: {error:.2g} of the typical size apart"


def same(x: Floats, y: Floats, what: str) -> None:
    """Assert that two arrays are the same bits."""
    assert np.array_equal(x, y), f"{what}: not the same bits, up to {np.abs(x - y).max():.3g} apart"


def agree(a: Answer, b: Answer, what: str) -> None:
    """Assert that two answers are the same: tokens, text, counts and traces."""
    assert a.prompt_ids == b.prompt_ids, what
    assert (a.ids, a.text, a.finished) == (b.ids, b.text, b.finished), f"{what}: {a.text!r} and {b.text!r}"
    assert (a.tokens_seen, a.tokens_moved) == (b.tokens_seen, b.tokens_moved), what
    assert [(t.guard, t.layer) for t in a.traces] == [(t.guard, t.layer) for t in b.traces], what
    for s, t in zip(a.traces, b.traces, strict=True):
        at = f"{what}, guard {t.guard} on layer {t.layer}"
        close(s.rho, t.rho, f"{at}: rho", tolerance=1e-3)
        close(s.delta, t.delta, f"{at}: delta", tolerance=1e-3)
        assert np.array_equal(s.delta != 0, t.delta != 0), f"{at}: other tokens were moved"


CONTRACT: dict[str, Callable[[Bench], None]] = {}
"""Every check of the contract by name. A check raises AssertionError; what it breaks on the way it undoes."""


def contract(check: Callable[[Bench], None]) -> Callable[[Bench], None]:
    assert check.__name__ not in CONTRACT
    CONTRACT[check.__name__] = check
    return check
