"""Controls: is it this direction, and is it this rule? Other directions and other rules at the same displacement.

    result = controls(model, trait.test, guard, benign=prompts, scorer=scorer, embeddings=(pos, neg))
    print(result)

A direction that reads a trait need not write it, and any push that is large enough changes what a model says. So every arm
moves tokens equally far: its strength is bisected until the mean |delta| over the tokens of given conversations is the
guard's. Two families:

* directions, under the guard's own rule: `random` ones, `orthogonal` ones (random, at a right angle to the guard's), and
  `shuffled` ones (fitted as the guard's was, on the poles' labels drawn by lot). Each stands on its boundary as the guard's
  does: the same share of tokens below, the class means and spreads as far from it.
* rules, along the guard's own direction: SwFC, StTP, StMP, Floor, Target, Ablate.

What cannot be matched (Ablate has no strength; a rule may move tokens further at its least) is measured all the same and
says so. For each arm: trait, coherence, the share of the gap recovered, KL to the unguarded model on benign prompts, each
paired with the unguarded answers, and the directions with the guard's too.

It knows backends, probes, rules by name and scorers. The guard has one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Backend, Floats, Sampling
from steerguard.errors import InputError, RuleError
from steerguard.fitting import prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered_interval
from steerguard.metrics.likelihood import divergences
from steerguard.metrics.reading import Exchange, check_unguarded
from steerguard.probe import Evidence, Probe, fit_probe
from steerguard.prompts import Prompt
from steerguard.rules import RULES, Rule, shift
from steerguard.rules import rule as rule_of
from steerguard.scorers import Score, Scorer
from steerguard.sweeping.answers import Answers, Row
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage

COMPARED = ("SwFC", "StTP", "StMP", "Floor", "Target", "Ablate")
"""The rules that are compared at one displacement."""
UNKNOWN = Evidence(0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0, 0)
"""What is known of how well a control's direction reads: nothing."""
CLOSE = 0.01
"""Relative difference in mean |delta| up to which an arm counts as matched."""
STEPS = 60
BATCH = 16

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """A rule at the strength at which it moves tokens as far as it should."""

    rule: Rule
    shift: float
    "mean |delta| over the tokens, in units of the residual stream"
    matched: bool
    "whether that is within one percent of what was asked for"


@dataclass(frozen=True)
class Control:
    """One arm."""

    name: str
    family: str
    "baseline, guard, direction or rule"
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
    kl: Interval | None
    "nats per predicted token on the benign prompts, to the unguarded model; None without benign prompts"


@dataclass(frozen=True)
class Controls:
    """All arms: `unguarded` and `aligned` first, then the guard, directions and rules."""

    arms: tuple[Control, ...]
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
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise InputError(f"there is no arm {name!r}; there are {', '.join(found)}")
        return found[name]

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


# ------------------------------------------------------------------------------------------------------- matching


def mean_shift(rule: Rule, probe: Probe, rho: Doubles) -> float:
    """Mean |delta| of a rule over tokens whose projections are rho `[tokens]`, in units of the residual stream."""
    return float(np.abs(shift(np, rho.astype(np.float32), rule.compile(probe).row()).astype(np.float64)).mean())


def match(name: str, probe: Probe, rho: Doubles, target: float) -> Matched:
    """The rule of that name at the strength at which its mean |delta| is `target`.

    The larger of two such strengths: beyond it, the rule moves tokens ever further.

    Raises:
        RuleError: the rule does not compile with this probe.
    """
    if target <= 0 or not len(rho):
        raise InputError(f"a displacement to match must be above 0 and over tokens, got {target} over {len(rho)}")
    cls = RULES[name]
    if not cls.grid and name != "Floor":
        found = rule_of(name)
        moved = mean_shift(found, probe, rho)
        return Matched(found, moved, abs(moved - target) <= CLOSE * target)
    # 1. strengths of which one moves less, and one more
    low = float(rho.min()) if name == "Floor" else max(cls.minimum, 0.0)
    width = max(1.0, float(np.ptp(rho)))
    high = low + width
    for _ in range(STEPS):
        if mean_shift(rule_of(name, high), probe, rho) >= target:
            break
        low, high = high, high + (width := 2 * width)
    if mean_shift(rule_of(name, low), probe, rho) > target:
        high = low  # it moves further at its least
    # 2. halve what is between
    for _ in range(STEPS):
        middle = (low + high) / 2
        if mean_shift(rule_of(name, middle), probe, rho) < target:
            low = middle
        else:
            high = middle
    found = rule_of(name, high)
    moved = mean_shift(found, probe, rho)
    return Matched(found, moved, abs(moved - target) <= CLOSE * target)


def projections(model: Backend, exchanges: Sequence[Exchange], guard: Guard, directions: Sequence[Floats]) -> list[Doubles]:
    """rho `[tokens]` along each direction of the tokens that the guard sees, read with the unguarded model."""
    layer, read = guard.layers[0], []
    for prompt, answer in exchanges:
        h = model.residuals(prompt, tuple(answer)[:-1])[layer]
        read.append(h if guard.positions == "all" else h[len(h) - max(len(answer) - 1, 0) :])
    tokens = np.concatenate(read).astype(np.float64)
    if not np.isfinite(tokens).all():
        raise InputError(f"the residuals of layer {layer} are not finite; load the model in a wider dtype")
    return [tokens @ v.astype(np.float64) for v in directions]


# ----------------------------------------------------------------------------------------------------- directions


def random_direction(width: int, rng: np.random.Generator, *, orthogonal_to: Floats | None = None) -> Floats:
    """A unit vector `[width]` of no meaning; at a right angle to another, if one is given."""
    v = rng.normal(size=width)
    if orthogonal_to is not None:
        other = orthogonal_to.astype(np.float64)
        v -= (v @ other) / (other @ other) * other
    return (v / np.linalg.norm(v)).astype(np.float32)


def shuffled_direction(pos: Floats, neg: Floats, probe: Probe, rng: np.random.Generator) -> Floats:
    """The direction that fitting finds in embeddings `[n, d]` of which half the pairs have their poles exchanged."""
    swap = np.zeros(len(pos), bool)
    swap[rng.permutation(len(pos))[: len(pos) // 2]] = True
    one, other = np.where(swap[:, None], neg, pos), np.where(swap[:, None], pos, neg)
    return fit_probe(one, other, layer=probe.layer, groups=np.arange(len(pos), dtype=np.int64)).v


def standing_as(probe: Probe, v: Floats, rho: Doubles, on_v: Doubles) -> Probe:
    """A probe along v that stands among the tokens `on_v` `[tokens]` as the guard's stands among `rho` `[tokens]`.

    As large a share of tokens lies below its boundary, and its class means and spreads are as far from it.
    """
    m = float(np.quantile(on_v, float((rho < probe.m).mean())))
    moved = m - probe.m
    return replace(probe, v=v, m=m, mu_pos=probe.mu_pos + moved, mu_neg=probe.mu_neg + moved, evidence=UNKNOWN)


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
        plan, target, tokens = _plan(model, exchanges, guard, embeddings, directions, rules, seed)
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
        arms=_arms(plan, scores, kl, [scenario.id for scenario in scenarios]), target=target, tokens=tokens,
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
    directions: int, rules: Sequence[str], seed: int,
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
    for name in rules:
        found = match(name, probe, rho, target)
        control = replace(guard, name=name, rule=found.rule, provenance={"control": name})
        plan.append(_Planned(name, "rule", control, found.shift, found.matched, 1.0))
    return plan, target, len(rho)


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
                kl=bootstrap_interval(kl[one.name]) if one.name in kl else None,
            )
        )  # fmt: skip
    return tuple(out)
