"""Controls: is it this direction, and is it this rule? Other directions and other rules at the same displacement.

    result = controls(model, trait.test, guard, benign=prompts, scorer=scorer, embeddings=(pos, neg))
    print(result)

A direction that reads a trait need not write it, and any push that is large enough changes what a model says. So every arm
moves tokens equally far: its strength is bisected until the mean |delta| over the tokens of given conversations is the
guard's. Four families:

* `direction`, under the guard's own rule: `random` ones, `orthogonal` ones (random, at a right angle to the guard's), and
  `shuffled` ones (fitted as the guard's was, on the poles' labels drawn by lot). Each stands on its boundary as the guard's
  does: the same share of tokens below, the class means and spreads as far from it.
* `fit`, under the guard's own rule: the direction found the other way, `logistic` or `mean-difference`, with the
  boundary and the statistics of its own fit.
* `rule`, along the guard's own direction: SwFC, StTP, StMP, Floor, Target, Ablate.
* `gate`: the guard's own rule without its gate, at the guard's own strength; StTP alone has one (Target). It moves tokens
  further, which is what a gate is for.

What cannot be matched (Ablate has no strength; a rule may move tokens further at its least) is measured all the same and
says so. For each arm: trait, coherence, the share of the gap recovered, KL to the unguarded model on benign prompts, each
paired with the unguarded answers, and with the guard's too.

It knows backends, probes, rules by name and scorers. The guard has one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steerguard.backends.base import Backend, Floats, Sampling
from steerguard.errors import InputError, RuleError
from steerguard.evaluate import BATCH
from steerguard.evaluate.matching import (
    CLOSE,
    match,
    mean_shift,
    projections,
    random_direction,
    shuffled_direction,
    standing_as,
)
from steerguard.evaluate.results import by_name
from steerguard.fitting import prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered_interval
from steerguard.metrics.likelihood import divergences
from steerguard.metrics.reading import Exchange, check_unguarded
from steerguard.probe import Direction, Probe, fit_probe
from steerguard.prompts import Prompt
from steerguard.rules import RULES, StTP, Target
from steerguard.scorers import Score, Scorer
from steerguard.sweeping.answers import Answers, Row
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage

COMPARED = ("SwFC", "StTP", "StMP", "Floor", "Target", "Ablate")
"""The rules that are compared at one displacement."""
FOUND: tuple[Direction, ...] = ("logistic", "mean-difference")
"""How a direction may be found."""
SAME = 0.9999
"""Cosine from which two directions are one."""


@dataclass(frozen=True)
class Control:
    """One arm."""

    name: str
    family: str
    "baseline, guard, direction, fit, rule or gate"
    rule: str
    "with its strength; empty for a baseline"
    shift: float
    "mean |delta| over the tokens that were matched on, read with the unguarded model"
    matched: bool
    cosine: float | None
    "of its direction with the guard's"
    trait: Interval | None
    coherence: Interval | None
    change: Interval | None
    "trait less that of the unguarded answers, scenario by scenario"
    recovered: Interval | None
    "share of the gap from unguarded to aligned, in percent"
    less_than_guard: Interval | None
    "trait less that of the guard's answers, scenario by scenario"
    of_guard: Interval | None
    "how much of what the guard changes it changes too, in percent; None where the guard raises nothing"
    kl: Interval | None
    "nats per predicted token on the benign prompts, to the unguarded model; None without benign prompts"


@dataclass(frozen=True)
class Controls:
    """All arms: `unguarded` and `aligned` first, then the guard, directions and rules."""

    arms: tuple[Control, ...]
    pooled: Mapping[str, Interval | None]
    "random, orthogonal, shuffled -> `of_guard` of all directions of the kind together, each scenario's mean over them"
    fits: Mapping[str, float]
    "how a direction may be found -> its cosine with the guard's, read from the embeddings; empty without them"
    target: float
    "the guard's mean |delta|, in units of the residual stream"
    tokens: int
    "that it is the mean over"
    scenarios: int
    benign: int
    model: str
    guard: str
    "its digest"
    scorer: Mapping[str, Any]
    sampling: Sampling
    seed: int

    def arm(self, name: str) -> Control:
        """The arm of that name. Raises InputError, naming what there is."""
        return by_name(self.arms, name, "arm")

    def __str__(self) -> str:
        lines = [
            f"mean |delta| {self.target:.3g} over {self.tokens} tokens; {self.scenarios} scenarios, {self.benign} benign prompts"
        ]
        for arm in self.arms:
            note = "" if arm.matched else f", NOT matched: mean |delta| {arm.shift:.3g}"
            lines.append(
                f"{arm.name} {arm.rule}: trait {arm.trait}, coherence {arm.coherence}, recovered {arm.recovered} %{note}"
            )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- all of it at once


def controls(
    model: Backend,
    scenarios: Sequence[Scenario],
    guard: Guard,
    *,
    scorer: Scorer,
    benign: Sequence[Prompt] = (),
    embeddings: tuple[Floats, Floats] | None = None,
    directions: int = 3,
    rules: Sequence[str] = COMPARED,
    sampling: Sampling = Sampling(),
    seed: int = 42,
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Controls:
    """Answer the scenarios under the misaligned system prompt in every arm, and measure them.

    The displacement is matched on these conversations with the unguarded model's answers.

    Args:
        benign: prompts for KL; none: it is not measured.
        embeddings: `[n, d]` of the guard's layer, the answers of both poles that it was fitted on, for shuffled labels.
        directions: random ones, orthogonal ones and shuffled ones, so many of each.
        rules: names of the rules to compare.
        seed: of the directions.
        store: a journal that answers are kept in as they come, and found again in.

    Raises:
        InputError: no scenarios, a guard of several layers or one that moves nothing, or a model inside `guarded`.
    """
    if not scenarios or len(guard.probes) != 1:
        raise InputError(f"controls need scenarios and a guard of one layer, got {len(scenarios)} and {len(guard.probes)} layers")
    unknown = sorted(set(rules) - set(RULES))
    if unknown:
        raise RuleError(f"there is no rule {unknown[0]!r}; there are {', '.join(RULES)}")
    check_unguarded(model)
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)
        # 1. the baselines, and what is matched on
        aligned, misaligned = zip(*(prompts_of(scenario) for scenario in scenarios), strict=True)
        plain = answers.of([Row(prompt) for prompt in misaligned], "controls, unguarded", whole=True)
        best = answers.of([Row(prompt) for prompt in aligned], "controls, aligned")
        exchanges = [(prompt, kept.ids) for prompt, kept in zip(misaligned, plain, strict=True)]
        fits = _fits(guard, embeddings)
        plan, target, tokens = _plan(model, exchanges, guard, embeddings, fits, directions, rules, seed)
        # 2. every arm's answers and scores
        said = {"unguarded": [kept.text for kept in plain], "aligned": [kept.text for kept in best]}
        for one in plan:
            rows = [Row(prompt, (one.guard,)) for prompt in misaligned]
            said[one.name] = [kept.text for kept in answers.of(rows, f"controls, {one.name}")]
        harmless = answers.of([Row(prompt) for prompt in benign], "controls, benign prompts", whole=True)
    scores = {arm: scorer.scores(scenarios, texts) for arm, texts in said.items()}
    # 3. what each does where there is nothing to do
    read = [(prompt, kept.ids) for prompt, kept in zip(benign, harmless, strict=True)]
    kl = divergences(model, read, {one.name: one.guard for one in plan}, progress=progress) if read else {}
    return Controls(
        arms=_arms(plan, scores, kl, [scenario.id for scenario in scenarios]),
        pooled=_pooled(plan, scores),
        fits={name: float(own.v @ guard.probes[0].v) for name, own in fits.items()}, target=target, tokens=tokens,
        scenarios=len(scenarios), benign=len(benign), model=model.identity.name, guard=guard.digest,
        scorer=dict(scorer.identity), sampling=sampling, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Planned:
    name: str
    family: str
    guard: Guard
    shift: float
    matched: bool
    cosine: float


def _plan(
    model: Backend, exchanges: Sequence[Exchange], guard: Guard, embeddings: tuple[Floats, Floats] | None,
    fits: Mapping[str, Probe], directions: int, rules: Sequence[str], seed: int,
) -> tuple[list[_Planned], float, int]:  # fmt: skip
    """The arms that are guarded, the displacement, and over how many tokens."""
    probe, rng = guard.probes[0], np.random.default_rng(seed)
    others: dict[str, Floats] = {}
    for i in range(1, directions + 1):
        others[f"random-{i}"] = random_direction(len(probe.v), rng)
        others[f"orthogonal-{i}"] = random_direction(len(probe.v), rng, orthogonal_to=probe.v)
        if embeddings is not None:
            others[f"shuffled-{i}"] = shuffled_direction(*embeddings, probe, rng)
    rho, *on_others = projections(model, exchanges, guard, [probe.v, *others.values()])
    target = mean_shift(guard.rule, probe, rho)
    if target == 0:
        raise InputError(f"guard {guard.name!r} moves no token of these conversations: there is no displacement to match")
    plan = [_Planned("guard", "guard", guard, target, True, 1.0)]
    for (name, v), on_v in zip(others.items(), on_others, strict=True):
        own = standing_as(probe, v, rho, on_v)
        found = match(guard.rule.name, own, on_v, target)
        control = replace(guard, name=name, probes=(own,), rule=found.rule, provenance={"control": name}, allow_weak=True)
        plan.append(_Planned(name, "direction", control, found.shift, found.matched, float(v @ probe.v)))
    plan += _fitted(model, exchanges, guard, fits, target)
    for name in rules:
        found = match(name, probe, rho, target)
        control = replace(guard, name=name, rule=found.rule, provenance={"control": name})
        plan.append(_Planned(name, "rule", control, found.shift, found.matched, 1.0))
    if isinstance(guard.rule, StTP):
        ungated = Target(guard.rule.alpha)
        control = replace(guard, name="ungated", rule=ungated, provenance={"control": "ungated"})
        moved = mean_shift(ungated, probe, rho)
        plan.append(_Planned("ungated", "gate", control, moved, abs(moved - target) <= CLOSE * target, 1.0))
    return plan, target, len(rho)


def _fits(guard: Guard, embeddings: tuple[Floats, Floats] | None) -> dict[str, Probe]:
    """The probe that each way of fitting finds in the embeddings."""
    if embeddings is None:
        return {}
    layer, groups = guard.probes[0].layer, np.arange(len(embeddings[0]), dtype=np.int64)
    return {name: fit_probe(*embeddings, layer=layer, groups=groups, direction=name) for name in FOUND}


def _fitted(
    model: Backend, exchanges: Sequence[Exchange], guard: Guard, fits: Mapping[str, Probe], target: float
) -> list[_Planned]:
    """The guard's rule along what other ways of fitting find; not along a direction that is the guard's own."""
    plan = []
    for name, own in fits.items():
        cosine = float(own.v @ guard.probes[0].v)
        if cosine > SAME:
            continue
        try:
            own_guard = replace(guard, name=name, probes=(own,), provenance={"control": name}, allow_weak=True)
        except RuleError:  # its boundary does not lie between its classes; its cosine is told all the same
            continue
        (rho,) = projections(model, exchanges, guard, [own.v])
        found = match(guard.rule.name, own, rho, target)
        plan.append(_Planned(name, "fit", replace(own_guard, rule=found.rule), found.shift, found.matched, cosine))
    return plan


def _pooled(plan: Sequence[_Planned], scores: Mapping[str, Sequence[Score]]) -> dict[str, Interval | None]:
    """Of each kind of direction, how much of the guard's change it brings, its directions taken together."""
    trait = {arm: [score.trait for score in own] for arm, own in scores.items()}
    out = {}
    for kind in dict.fromkeys(one.name.rpartition("-")[0] for one in plan if one.family == "direction"):
        arms = [trait[one.name] for one in plan if one.family == "direction" and one.name.startswith(f"{kind}-")]
        known = [[value for value in values if value is not None] for values in zip(*arms, strict=True)]
        means = [sum(values) / len(values) if values else None for values in known]
        out[kind] = recovered_interval(trait["unguarded"], trait["guard"], means)
    return out


def _arms(
    plan: Sequence[_Planned], scores: Mapping[str, Sequence[Score]], kl: Mapping[str, Sequence[float | None]],
    groups: Sequence[str],
) -> tuple[Control, ...]:  # fmt: skip
    trait = {arm: [score.trait for score in own] for arm, own in scores.items()}
    nothing = {name: _Planned(name, "baseline", plan[0].guard, 0.0, True, 1.0) for name in ("unguarded", "aligned")}
    out = []
    for one in (*nothing.values(), *plan):
        own, baseline = trait[one.name], one.family == "baseline"
        out.append(
            Control(
                name=one.name, family=one.family, rule="" if baseline else str(one.guard.rule), shift=one.shift,
                matched=one.matched, cosine=None if baseline else one.cosine,
                trait=bootstrap_interval(own, groups=groups),
                coherence=bootstrap_interval([score.coherence for score in scores[one.name]], groups=groups),
                change=paired_difference(own, trait["unguarded"], groups=groups),
                recovered=recovered_interval(trait["unguarded"], trait["aligned"], own),
                less_than_guard=paired_difference(own, trait["guard"], groups=groups),
                of_guard=recovered_interval(trait["unguarded"], trait["guard"], own),
                kl=bootstrap_interval(kl[one.name]) if one.name in kl else None,
            )
        )  # fmt: skip
    return tuple(out)
