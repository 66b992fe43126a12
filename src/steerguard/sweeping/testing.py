"""The report on the `test` split: aligned, malicious and every guard, on scenarios that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerguard.backends.base import Backend, Sampling
from steerguard.fitting import Stage, prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.scorers import Score, Scorer, scorer_for
from steerguard.sweeping.answers import Answers, Kept, Row
from steerguard.sweeping.points import Figures, Setting
from steerguard.sweeping.run import BATCH
from steerguard.traits import Scenario, Trait

TEST_JOURNAL = "test.jsonl"
"""The file of a fit's folder that the answers to the test scenarios are kept in."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to answer a set of scenarios, its answers and what they measured."""

    name: str
    "aligned, malicious, or the name that the guard was given under"
    setting: Setting | None
    "None for a baseline"
    figures: Figures
    scores: tuple[Score, ...]
    answers: tuple[Kept, ...]
    "one for each scenario, with tokens and projections"


def compare(
    model: Backend,
    trait: Trait,
    guards: Mapping[str, Guard],
    *,
    scenarios: Sequence[Scenario] | None = None,
    scorer: Scorer | None = None,
    beside: Sequence[Guard] = (),
    sampling: Sampling = Sampling(),
    batch: int = BATCH,
    store: Path | None = None,
    progress: Stage | None = None,
) -> list[Arm]:
    """Aligned, malicious and every guard on the `test` scenarios.

    The baselines are read along the first guard's direction, by a guard that only looks.

    Args:
        beside: guards that are on in every arm but the aligned one, before the arm's own.
        store: a journal that answers are kept in, so that an interrupted report goes on where it was.
    """
    scenarios = trait.test if scenarios is None else scenarios
    scorer = scorer or scorer_for(trait)
    reading = tuple(guard.watching("all") for guard in list(guards.values())[:1])
    plan: list[tuple[str, int, tuple[Guard, ...]]] = [("aligned", 0, reading), ("malicious", 1, (*beside, *reading))]
    plan += [(name, 1, (*beside, guard)) for name, guard in guards.items()]
    rows = [Row(prompts_of(scenario)[pole], own) for _, pole, own in plan for scenario in scenarios]
    with Journal(store) as journal:
        kept = Answers(model, sampling, journal, batch=batch, progress=progress)
        answers = kept.of(rows, "test scenarios answered", whole=True)
    scores = scorer.scores(list(scenarios) * len(plan), [answer.text for answer in answers])
    arms = []
    for i, (name, _, _) in enumerate(plan):
        part = slice(i * len(scenarios), (i + 1) * len(scenarios))
        guard = guards.get(name)
        setting = None if guard is None else Setting(guard.rule, guard.layers, guard.positions)
        figures = Figures.of(scores[part], answers[part])
        arms.append(Arm(name, setting, figures, tuple(scores[part]), tuple(answers[part])))
    return arms
