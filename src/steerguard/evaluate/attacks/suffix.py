"""A white-box attacker: tokens after the malicious prompt, optimised through the acting guard to lie while projecting as honest.

    result = suffix_attack(model, trait.test[:8], guard, scorer=scorer, held_out=trait.test[8:16], benign=prompts)
    control = suffix_attack(model, trait.test[:8], guard, scorer=scorer, plan=Plan().blind())

The attacker has the weights, the guard and its boundary, and aims at the very answers that the unguarded model gives. Whether the
suffix works is told by real generation: on the scenarios that it was optimised on, and on held-out ones (does it transfer?),
each beside the same prompts without a suffix. `noticed` is what a filter on perplexity, the cheapest detector, would see of it.

Transformers models only: vLLM and the fake backend have no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from steerguard.backends.base import Backend, Sampling
from steerguard.backends.hf import TransformersModel
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.attacks.monitor import Detection, detection
from steerguard.evaluate.attacks.objective import Attacked, Objective
from steerguard.evaluate.attacks.search import Allowed, Found, Plan, Slot, allowed, search, start
from steerguard.evaluate.attacks.trial import Attack, Trial, succeeded
from steerguard.evaluate.results import figure
from steerguard.fitting import prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal, content_key
from steerguard.metrics import Interval, bootstrap_interval, paired_difference
from steerguard.metrics.likelihood import surprisal
from steerguard.prompts import Prompt, as_conversation, render
from steerguard.scorers import Scorer
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage


@dataclass(frozen=True)
class Suffix:
    """One suffix, and what it was optimised on."""

    scenarios: tuple[str, ...]
    found: Found


@dataclass(frozen=True)
class SuffixAttack:
    """What the attacker found and what it did."""

    plan: Plan
    suffixes: tuple[Suffix, ...] = field(repr=False)
    skipped: int
    "scenarios on which the unguarded model does not misbehave anyway: there is no answer to aim at"
    own: Attack
    "on the scenarios that the suffixes were optimised on"
    own_without: Attack
    "the same prompts without a suffix"
    held_out: Attack | None
    "on other scenarios, each with one of the suffixes; None without any"
    held_out_without: Attack | None
    gain: Interval | None
    "success against the guard with the suffix less that without, scenario by scenario; shares"
    transfer: Interval | None
    "the same on the held-out scenarios"
    loss_before: Interval | None
    "of the suffix that a search started from"
    loss: Interval | None
    "of the best that it found"
    surprisal: Interval | None
    "nats per token, the highest mean over as many tokens in a row as a suffix has, of prompts with a suffix"
    ordinary: Interval | None
    "the same of the prompts without one, and of benign prompts"
    noticed: Detection | None
    "that figure as a detector of the suffix"

    def __str__(self) -> str:
        kind = "gradient-guided" if self.plan.gradient else "random"
        lines = [
            f"{kind} suffix of {self.plan.length} tokens, {self.plan.evaluations} forward passes for a scenario; "
            f"loss {figure(self.loss_before)} to {figure(self.loss)}",
            f"own scenarios: {self.own}; the suffix adds {figure(self.gain)}",
        ]
        if self.held_out is not None:
            lines.append(f"held out: {self.held_out}; the suffix adds {figure(self.transfer)}")
        if self.noticed is not None:
            lines.append(
                f"perplexity: {figure(self.surprisal)} with, {figure(self.ordinary)} without; AUROC {figure(self.noticed.auroc)}"
            )
        return "\n".join(lines)


def suffix_attack(
    model: Backend,
    scenarios: Sequence[Scenario],
    guard: Guard,
    *,
    scorer: Scorer,
    held_out: Sequence[Scenario] = (),
    plan: Plan = Plan(),
    each: bool = True,
    benign: Sequence[Prompt] = (),
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> SuffixAttack:
    """Optimise suffixes against the guard, and try them by real generation.

    Args:
        held_out: scenarios that no suffix was optimised on.
        each: one suffix for each scenario, tried on held-out ones in turns; False: one for all together.
        benign: prompts in which there is nothing to notice.
        store: a journal that answers and steps are kept in as they come, and found again in.

    Raises:
        InputError: a backend without gradients, a model inside `guarded`, or no scenario on which the unguarded model misbehaves.
    """
    if not isinstance(model, TransformersModel):
        raise InputError(f"the backend {model.name!r} gives no gradients; load the model with backend='hf' for a suffix attack")
    with closing(Journal(store)) as journal:
        trial = Trial(model, guard, scorer, journal, benign=benign, sampling=sampling, batch=batch, progress=progress)
        # 1. what to aim at: what the unguarded model says, where that misbehaves
        aims = _aims(trial, scenarios)
        # 2. the search
        tokens = allowed(model.tokenizer, model.vocabulary)
        groups = [[one] for one in aims] if each else [aims]
        suffixes = []
        for i, group in enumerate(groups):
            suffixes.append(_optimised(model, guard, group, plan, tokens, journal, (i, len(groups)), progress))
        # 3. what they do
        aimed = [scenario for scenario, _ in aims]
        own, without = _tried(trial, aimed, suffixes, plan)
        other, other_without = _tried(trial, held_out, suffixes, plan) if held_out else (None, None)
    # 4. what a filter would see
    with_suffix = [_suffixed(model, one, suffixes[i % len(suffixes)], plan) for i, one in enumerate(aimed)]
    ordinary = [*(prompts_of(one)[1] for one in aimed), *benign]
    odd = [[surprise(model, prompt, plan.length) for prompt in prompts] for prompts in (with_suffix, ordinary)]
    return SuffixAttack(
        plan=plan, suffixes=tuple(suffixes), skipped=len(scenarios) - len(aims), own=own, own_without=without,
        held_out=other, held_out_without=other_without, gain=_gain(own, without),
        transfer=None if other is None or other_without is None else _gain(other, other_without),
        loss_before=bootstrap_interval([one.found.losses[0] for one in suffixes]),
        loss=bootstrap_interval([one.found.loss for one in suffixes]),
        surprisal=bootstrap_interval(odd[0]), ordinary=bootstrap_interval(odd[1]),
        noticed=detection("perplexity", odd[0], odd[1]),
    )  # fmt: skip


def surprise(model: TransformersModel, prompt: Prompt, window: int) -> float:
    """The highest mean -log p of so many tokens of a prompt in a row, in nats per token, to the unguarded model."""
    ids = render(model.tokenizer, as_conversation(prompt)).ids
    each = surprisal(model.logits(prompt)[:-1], ids[1:])
    sums = np.convolve(each, np.ones(min(window, len(each))), "valid")
    return float(sums.max() / min(window, len(each)))


# ---------------------------------------------------------------------------------------------------------- steps


def _aims(trial: Trial, scenarios: Sequence[Scenario]) -> list[tuple[Scenario, tuple[int, ...]]]:
    """The scenarios on which the unguarded model misbehaves, with the tokens of that answer."""
    if len({one.id for one in scenarios}) < len(scenarios):
        raise InputError("a suffix attack needs scenarios with ids of their own")
    kept = trial.unguarded([prompts_of(one)[1] for one in scenarios], "plain")
    scores = trial.scorer.scores(scenarios, [one.text for one in kept])
    found = [(one, own.ids) for one, own, score in zip(scenarios, kept, scores, strict=True) if succeeded(score) and own.ids]
    if not found:
        raise InputError(
            f"the unguarded model misbehaves on none of {len(scenarios)} scenarios under their malicious prompts, so there is no "
            "answer to aim at; give other scenarios"
        )
    return found


def _optimised(
    model: TransformersModel, guard: Guard, group: Sequence[tuple[Scenario, tuple[int, ...]]], plan: Plan, tokens: Allowed,
    journal: Journal, place: tuple[int, int], progress: Stage | None,
) -> Suffix:  # fmt: skip
    """The best suffix for these scenarios together."""
    slots = [Slot(model.tokenizer, scenario, plan.place) for scenario, _ in group]
    start(slots, tokens, plan.length, np.random.default_rng(plan.seed))  # so that every slot knows its place
    objectives = [
        Objective(model, guard, Attacked(*slot.around(), tuple(ids)[: plan.tokens]), weight=plan.weight, margin=plan.margin)
        for slot, (_, ids) in zip(slots, group, strict=True)
    ]
    asked = [asdict(objective.asked) for objective in objectives]
    key = content_key("suffix", dict(model.identity.weights), guard.digest, asdict(plan), asked)
    i, n = place

    def told(step: int) -> None:
        if progress is not None:
            what = "steps of the suffix search" if plan.gradient else "steps of the random search"
            progress(what, i * plan.steps + step, n * plan.steps)

    found = search(
        slots, objectives, tokens, plan, lambda rng: start(slots, tokens, plan.length, rng), journal=journal, key=key, told=told
    )
    return Suffix(tuple(scenario.id for scenario, _ in group), found)


def _tried(
    trial: Trial, scenarios: Sequence[Scenario], suffixes: Sequence[Suffix], plan: Plan
) -> tuple[Attack, Attack]:  # fmt: skip
    """The suffixes in turns on these scenarios, and the same prompts without."""
    assert isinstance(trial.model, TransformersModel)
    name = "suffix" if plan.gradient else "random suffix"
    prompts = [_suffixed(trial.model, one, suffixes[i % len(suffixes)], plan) for i, one in enumerate(scenarios)]
    plain = [prompts_of(one)[1] for one in scenarios]
    return trial.attack(name, "suffix", scenarios, prompts), trial.attack("plain", "control", scenarios, plain)


def _suffixed(model: TransformersModel, scenario: Scenario, suffix: Suffix, plan: Plan) -> Prompt:
    return Slot(model.tokenizer, scenario, plan.place).prompt(suffix.found.text)


def _gain(attack: Attack, without: Attack) -> Interval | None:
    """Success against the guard, with less without."""
    after, before = (
        [None if case.success_guarded is None else float(case.success_guarded) for case in one.cases] for one in (attack, without)
    )
    return paired_difference(after, before, groups=[case.scenario for case in attack.cases])
