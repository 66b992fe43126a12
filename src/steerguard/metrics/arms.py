"""Everything that can be told without a judge of the answers of several arms to the same scenarios.

    measured = measure(model, trait.test, {arm.name: arm.answers for arm in arms}, probe=guard.probes[0])
    measured.interval("StTP", "cross_entropy")          # a mean with its interval, resampled by scenario
    measured.difference("StTP", "cross_entropy")        # the same less the aligned arm's, answer by answer

Whatever system prompt an answer was given under, the model reads it under one: the aligned one. So arms differ by what
they say, not by what they were told.

Source: arXiv 2604.08169 (cross-entropy, target distance, similarity to the aligned answer).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, get_args

from steerguard.backends.base import Answer, Backend
from steerguard.errors import InputError
from steerguard.fitting import Stage, prompts_of
from steerguard.metrics.likelihood import cross_entropy
from steerguard.metrics.measured import Measured, Values
from steerguard.metrics.projection import target_distance
from steerguard.metrics.reading import check_unguarded, each, exchanges
from steerguard.metrics.similarity import similarity
from steerguard.metrics.texts import compression, distinct, repetition
from steerguard.probe import Probe
from steerguard.prompts import conversation
from steerguard.traits import Scenario

Metric = Literal[
    "repetition", "distinct_1", "distinct_2", "compression", "similarity", "cross_entropy", "target_distance"
]  # fmt: skip
Context = Literal["aligned", "neutral"]
"""The system prompt that answers are read under for their projection: the scenario's aligned one, or none."""

TEXT: dict[Metric, Callable[[str], float | None]] = {
    "repetition": repetition,
    "distinct_1": lambda text: distinct(text, 1),
    "distinct_2": lambda text: distinct(text, 2),
    "compression": compression,
}
"""What needs nothing but the text."""


def measure(
    model: Backend,
    scenarios: Sequence[Scenario],
    arms: Mapping[str, Sequence[Answer]],
    *,
    probe: Probe | None = None,
    metrics: Collection[Metric] | None = None,
    context: Context = "aligned",
    baseline: str = "aligned",
    progress: Stage | None = None,
) -> Measured:
    """Every metric of every arm, answer by answer; answers to one scenario are resampled together.

    Args:
        scenarios: what each answer is an answer to; several answers to one scenario name it several times.
        arms: name -> one answer for each of the scenarios, in their order. The baseline's are the aligned answers.
        probe: for the target distance, which is measured along this probe at its layer.
        metrics: by default all, the target distance only with a probe. `similarity`, to the baseline's answer to the
            same scenario, needs the extra `similarity`; of the baseline itself it is 1.
        context: what answers are read under for the target distance; `neutral` for a probe that was fitted so.

    Raises:
        InputError: a model inside `guarded`, no baseline, another number of answers, a metric that does not exist, or
            the extra is not installed.
    """
    chosen = _chosen(metrics, probe)
    if baseline not in arms:
        raise InputError(f"the baseline's answers are needed: there is no arm {baseline!r} among {', '.join(arms) or 'none'}")
    if context not in get_args(Context):
        raise InputError(f"context must be {' or '.join(get_args(Context))}, got {context!r}")
    for name, answers in arms.items():
        if len(answers) != len(scenarios):
            raise InputError(f"arm {name!r} needs one answer to each scenario, got {len(answers)} for {len(scenarios)}")
    check_unguarded(model)
    aligned = [prompts_of(scenario)[0] for scenario in scenarios]
    read = aligned if context == "aligned" else [conversation(None, scenario.turns) for scenario in scenarios]
    goal = [answer.text for answer in arms[baseline]]
    values: dict[str, dict[str, Values]] = {}
    for name, answers in each(arms.items(), progress, "arms measured without a judge"):
        texts = [answer.text for answer in answers]
        own: dict[str, list[float | None]] = {m: [one(t) for t in texts] for m, one in TEXT.items() if m in chosen}
        if "similarity" in chosen:
            own["similarity"] = similarity(texts, goal)
        if "cross_entropy" in chosen:
            own["cross_entropy"] = cross_entropy(model, exchanges(aligned, answers))
        if "target_distance" in chosen and probe is not None:
            own["target_distance"] = target_distance(model, list(zip(read, texts, strict=True)), probe)
        values[name] = {metric: tuple(found) for metric, found in own.items()}
    return Measured(values, tuple(scenario.id for scenario in scenarios), baseline)


def _chosen(metrics: Collection[Metric] | None, probe: Probe | None) -> set[Metric]:
    """The metrics that were asked for."""
    known = get_args(Metric)
    if metrics is None:
        return set(known) - (set() if probe is not None else {"target_distance"})
    unknown = sorted(set(metrics) - set(known))
    if unknown:
        raise InputError(f"there is no metric {unknown[0]!r}; there are {', '.join(known)}")
    if "target_distance" in metrics and probe is None:
        raise InputError("the target distance is measured along a probe: pass probe=, or leave it out of metrics")
    return set(metrics)
