"""The whole line on the bundled model: fit, sweep and test a guard of each rule for each of its traits.

It knows which traits the organism has, how many scenarios and answers fit into a few minutes, and which
conversations to show. It measures and chooses with the same functions as everybody else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import steerguard
from steerguard.backends import load
from steerguard.backends.base import Backend, Floats, Sampling
from steerguard.errors import InputError
from steerguard.fitting import CONTRAST, Stage, fit
from steerguard.guard import Guard
from steerguard.organism.capability import benign, capability
from steerguard.organism.side_by_side import tell, workers
from steerguard.sweeping import (
    JOURNAL,
    PAPER_RULES,
    TEST_JOURNAL,
    Arm,
    Figures,
    Search,
    Sweep,
    compare,
    gap_recovered,
    grid,
    sweep,
)
from steerguard.sweeping.answers import Kept
from steerguard.traits import Scenario, Trait, trait

TRAITS: Mapping[str, str] = {"honesty": "organism-honesty", "compassion": "organism-compassion"}
SAMPLING = Sampling(temperature=0.6, top_p=0.9, seed=42, max_new_tokens=80)
"""The paper's, with room for the organism's longest answers; what rambles on is cut off, and counts as incoherent."""
SCREEN = 8
"""Scenarios of the `select` split that every setting of the grid answers; the best answer them all."""
EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Tokens:
    """An answer's tokens and where they stood on the guard's direction."""

    pieces: list[str]
    rho: Floats
    moved: list[bool]
    m: float
    spread: float


@dataclass(frozen=True)
class Example:
    """One conversation under the malicious system prompt, answered by several arms."""

    title: str
    system: str
    question: str
    answers: list[tuple[str, tuple[str, Tokens | None]]]
    "arm name, and its text with or without its tokens"


@dataclass(frozen=True)
class TraitResult:
    """What the demo measured for one trait, on its `test` split."""

    name: str
    arms: list[Arm]
    "aligned, malicious, then one per rule"
    capability: Mapping[str, float | None]
    "arm name -> score under neutral prompts, 0-100"
    examples: list[Example]
    sweep: Sweep

    def figures_of(self, name: str) -> Figures:
        return next(arm.figures for arm in self.arms if arm.name == name)

    def recovered(self, arm: Arm) -> float | None:
        """Share of the gap that a rule brought back, in percent; None for the baselines."""
        if arm.setting is None:
            return None
        return gap_recovered(arm.figures, aligned=self.figures_of("aligned"), malicious=self.figures_of("malicious"))


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured and wrote."""

    traits: list[TraitResult]
    guards: list[Path]
    "what may be used: a rule that the sweep refused has no file"
    seconds: float

    @property
    def refused(self) -> list[str]:
        """Rules without an operating point, and why; a barred one is in the table where it would have stood."""
        return [
            f"{t.name}: {rule} has no operating point: {why}" for t in self.traits for rule, why in t.sweep.refused.items()
        ]

    def figures(self) -> dict[str, Any]:
        """The figures of the tables, as JSON values."""
        return {
            "version": steerguard.__version__,
            "seconds": round(self.seconds, 1),
            "traits": {t.name: _figures(t) for t in self.traits},
        }


def run(out: Path, *, traits: Sequence[str] = tuple(TRAITS), progress: Stage | None = None) -> DemoResult:
    """Fit, sweep, test and save a guard of each of the paper's rules for each trait.

    Args:
        out: folder for the answers and the guard files; answers that are there already are not asked for again.

    Raises:
        InputError: a trait that the organism does not have.
    """
    for name in traits:
        if name not in TRAITS:
            raise InputError(f"the bundled model has no trait {name!r}; it has {', '.join(TRAITS)}")
    start = time.monotonic()
    lines = sorted(traits, key=list(TRAITS).index, reverse=True)  # the longest first
    with workers(len(traits), progress) as pool:
        work = {name: pool.submit(_line, name, out) for name in lines}
        unguarded = pool.submit(_unguarded)  # whoever is done first takes it
        done = {name: one.result() for name, one in work.items()}
        scores = dict.fromkeys(("aligned", "malicious"), unguarded.result())
    results = [replace(done[name], capability={**scores, **done[name].capability}) for name in traits]
    guards = [out / f"{name}-{rule}.guard" for name in traits for rule in done[name].sweep.best]
    return DemoResult(results, guards, time.monotonic() - start)


@cache
def _model() -> Backend:
    return load("organism")


def _unguarded() -> float:
    """The unguarded model's score under neutral prompts."""
    return capability(_model(), sampling=SAMPLING)


def _line(name: str, out: Path) -> TraitResult:
    """Fit, sweep and test for one trait, and save the guards of the rules that found an operating point."""

    def stage(what: str, done: int, total: int, rate: float = 0.0, /) -> None:
        tell(f"{name}: {what}", done, total, rate)

    model, data = _model(), trait(TRAITS[name])
    probes = fit(model, data, sampling=SAMPLING, store=out / name / CONTRAST, progress=stage)
    probes.save(out / name, overwrite=True)
    found = sweep(
        model, data, probes, settings=grid(probes), benign=benign(), search=Search(screen=SCREEN), sampling=SAMPLING,
        store=out / name / JOURNAL, progress=stage,
    )  # fmt: skip
    result = _test(model, data, found, out / name / TEST_JOURNAL, stage)
    for rule in found.best:
        found.guard_of(rule).save(out / f"{name}-{rule}.guard", overwrite=True)
    return result


def _test(model: Backend, data: Trait, found: Sweep, store: Path, progress: Stage) -> TraitResult:
    """The test split, read once: every arm's answers, the neutral prompts, and the examples.

    A rule that benign prompts alone refused is tested too, where it would have stood: what it would cost is a result.
    """
    shown = {**found.barred, **found.best}
    guards = {rule: found.guard_at(shown[rule]) for rule in PAPER_RULES if rule in shown}
    arms = compare(model, data, guards, sampling=SAMPLING, store=store, progress=progress)
    scores: dict[str, float | None] = {}
    for done, (rule, guard) in enumerate(guards.items()):
        progress("neutral prompts", done, len(guards))
        scores[rule] = capability(model, guards=guard, sampling=SAMPLING)
    progress("neutral prompts", len(guards), len(guards))
    return TraitResult(data.name, arms, scores, _examples(data, arms, guards), found)


def _examples(data: Trait, arms: Sequence[Arm], guards: Mapping[str, Guard]) -> list[Example]:
    """The first test scenarios of different categories, as they came: nothing is picked for its outcome."""
    first: dict[str, int] = {}
    for i, scenario in enumerate(data.test):
        first.setdefault(scenario.category, i)
    shown = [arm for arm in arms if arm.name in ("malicious", "StTP", "StMP")]
    return [
        Example(
            title=f"{data.name}, {data.test[i].category}",
            system=data.test[i].negative,
            question=_last_words(data.test[i]),
            answers=[(arm.name, (arm.answers[i].text, _tokens(arm.answers[i], guards.get(arm.name)))) for arm in shown],
        )
        for i in list(first.values())[:EXAMPLES]
    ]


def _tokens(answer: Kept, guard: Guard | None) -> Tokens | None:
    if guard is None:
        return None
    probe, start = guard.probes[0], len(answer.rho) + 1 - answer.n  # the last token drawn is never read
    rho, moved = np.array(answer.rho[start:], np.float32), [bool(delta) for delta in answer.delta[start:]]
    return Tokens(list(answer.pieces[: len(rho)]), rho, moved, probe.m, probe.delta_mu)


def _last_words(scenario: Scenario) -> str:
    return scenario.turns[-1]


def _figures(result: TraitResult) -> dict[str, Any]:
    rules = {}
    for arm in result.arms:
        if arm.setting is None:
            continue
        f = arm.figures
        rules[arm.name] = {
            "layer": arm.setting.layers[0], "alpha": arm.setting.rule.strength, "positions": arm.setting.positions,
            "trait": f.trait, "coherence": f.coherence, "capability": result.capability[arm.name],
            "recovered": result.recovered(arm), "repetition": f.repetition, "moved": f.moved, "shift": f.shift,
            "n": f.n, "unscored": f.unscored, "refused": result.sweep.refused.get(arm.name),
        }  # fmt: skip
    aligned, malicious = result.figures_of("aligned"), result.figures_of("malicious")
    return {
        "aligned": aligned.trait, "malicious": malicious.trait,
        "coherence": {"aligned": aligned.coherence, "malicious": malicious.coherence},
        "repetition": {"aligned": aligned.repetition, "malicious": malicious.repetition},
        "capability": result.capability["aligned"],
        "n": aligned.n, "settings": result.sweep.tried, "rules": rules,
    }  # fmt: skip
