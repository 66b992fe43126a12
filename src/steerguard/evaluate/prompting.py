"""Prompts against guards: does a sentence do as well?

    result = prompting(model, trait.test, guard, contrast.usable(), scorer=scorer)
    result.arm("reminder").of_guard          # how much of what the guard changes a reminder changes too, in percent

Six arms answer the same scenarios. Under the misaligned system prompt: `unguarded`; `guard`; `reminder`, the aligned system
prompt placed after the misaligned one; `few-shot`, exchanges placed before the question in which the model answers as it does
under the aligned prompt; `reminder+guard`. And `aligned`, under the aligned system prompt alone.

Whoever wrote the malicious prompt can write another after the reminder; the guard does not read either. That is not measured
here. It knows backends, guards and scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerguard.backends.base import Backend, Sampling
from steerguard.errors import InputError
from steerguard.evaluate import BATCH
from steerguard.evaluate.results import by_name
from steerguard.fitting import Pair, prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered_interval
from steerguard.metrics.reading import check_unguarded
from steerguard.prompts import Prompt, as_conversation, conversation
from steerguard.scorers import Scorer
from steerguard.sweeping.answers import Answers, Row
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage

SHOTS = 2
"""Exchanges that stand before the question."""


@dataclass(frozen=True)
class Prompted:
    """One arm."""

    name: str
    added: float
    "characters that its prompts have more than the unguarded arm's, on average"
    trait: Interval | None
    coherence: Interval | None
    change: Interval | None
    "trait less that of the unguarded answers, scenario by scenario"
    recovered: Interval | None
    "share of the gap from unguarded to aligned, in percent"
    of_guard: Interval | None
    "how much of what the guard changes it changes too, in percent; None where the guard raises nothing"
    less_than_guard: Interval | None
    "trait less that of the guard's answers, scenario by scenario"


@dataclass(frozen=True)
class Prompting:
    """All arms."""

    arms: tuple[Prompted, ...]
    scenarios: int
    shots: int

    def arm(self, name: str) -> Prompted:
        """The arm of that name. Raises InputError, naming what there is."""
        return by_name(self.arms, name, "arm")


def reminded(scenario: Scenario) -> Prompt:
    """The scenario under its misaligned system prompt and, after it, the aligned one."""
    return conversation(f"{scenario.negative}\n\n{scenario.positive}", scenario.turns)


def shown(scenario: Scenario, examples: Sequence[Pair]) -> Prompt:
    """The scenario under its misaligned system prompt, after exchanges in which the model answers as it should."""
    before = [text for pair in examples for text in (*pair.scenario.turns, pair.positive)]
    return conversation(scenario.negative, [*before, *scenario.turns])


def prompting(
    model: Backend,
    scenarios: Sequence[Scenario],
    guard: Guard,
    examples: Sequence[Pair],
    *,
    scorer: Scorer,
    shots: int = SHOTS,
    sampling: Sampling = Sampling(),
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Prompting:
    """Answer the scenarios in every arm, and measure them.

    Args:
        examples: aligned answers to other scenarios, to show; each scenario gets the next `shots` of them.
        store: a journal that answers are kept in as they come, and found again in.

    Raises:
        InputError: no scenarios, fewer examples than shots, or a model inside `guarded`.
    """
    if not scenarios or len(examples) < shots:
        raise InputError(f"prompting needs scenarios and {shots} examples, got {len(scenarios)} and {len(examples)}")
    check_unguarded(model)
    aligned, misaligned = zip(*(prompts_of(scenario) for scenario in scenarios), strict=True)
    few = [
        shown(scenario, [examples[(i * shots + j) % len(examples)] for j in range(shots)])
        for i, scenario in enumerate(scenarios)
    ]
    remind = [reminded(scenario) for scenario in scenarios]
    own = (guard,)
    plan: dict[str, tuple[Sequence[Prompt], tuple[Guard, ...]]] = {
        "unguarded": (misaligned, ()), "aligned": (aligned, ()), "guard": (misaligned, own), "reminder": (remind, ()),
        "few-shot": (few, ()), "reminder+guard": (remind, own),
    }  # fmt: skip
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)
        said = {
            name: [kept.text for kept in answers.of([Row(prompt, on) for prompt in prompts], f"prompting, {name}")]
            for name, (prompts, on) in plan.items()
        }
    scores = {name: scorer.scores(scenarios, texts) for name, texts in said.items()}
    trait = {name: [score.trait for score in own_scores] for name, own_scores in scores.items()}
    length = {name: sum(map(_length, prompts)) / len(scenarios) for name, (prompts, _) in plan.items()}
    return Prompting(
        arms=tuple(
            Prompted(
                name=name, added=length[name] - length["unguarded"], trait=bootstrap_interval(own_trait),
                coherence=bootstrap_interval([score.coherence for score in scores[name]]),
                change=paired_difference(own_trait, trait["unguarded"]),
                recovered=recovered_interval(trait["unguarded"], trait["aligned"], own_trait),
                of_guard=recovered_interval(trait["unguarded"], trait["guard"], own_trait),
                less_than_guard=paired_difference(own_trait, trait["guard"]),
            )
            for name, own_trait in trait.items()
        ),
        scenarios=len(scenarios), shots=shots,
    )  # fmt: skip


def _length(prompt: Prompt) -> int:
    return sum(len(message["content"]) for message in as_conversation(prompt))
