"""A sweep as one JSON document: the grid, the choice, the report on `test`, and all that is needed to do it again.

It puts together what others measured, and measures nothing itself but sums: intervals, histograms, categories. What the
document may hold is said by `result_file`, which reads what this writes before anybody else does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from steerguard.backends.base import Sampling
from steerguard.fitting import versions
from steerguard.metrics import Interval, Measured, bootstrap_interval, recovered_interval
from steerguard.scorers import Scorer
from steerguard.sweeping.choice import coherence_bar
from steerguard.sweeping.points import Figures, Setting
from steerguard.sweeping.result_file import SCHEMA
from steerguard.sweeping.run import Sweep
from steerguard.sweeping.testing import Arm
from steerguard.traits import Scenario, Trait

BINS = 48
TAIL = 0.2
"""Percent of the projections that stand in the outermost bins at each end: a few far ones would else leave the rest one bar."""


def document(
    found: Sweep,
    trait: Trait,
    scorer: Scorer,
    *,
    sampling: Sampling,
    arms: Sequence[Arm] = (),
    scenarios: Sequence[Scenario] = (),
    measured: Measured | None = None,
    command: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document as JSON values.

    Args:
        arms: what `compare` gave; none if the `test` split was not read.
        scenarios: those of the test.
        measured: what needs no judge, of the same arms and scenarios.
        command: how to do it again.
    """
    settings = [*found.points, *found.screened]
    index = {setting: i for i, setting in enumerate(settings)}
    return {
        "schema": SCHEMA,
        "trait": {
            "name": trait.name, "title": trait.title, "positive": asdict(trait.positive), "negative": asdict(trait.negative),
            "sha256": trait.digest, "scorer": dict(scorer.identity),
        },
        "model": asdict(found.probes.model),
        "settings": _settings(found, settings, sampling, command, recipe),
        "probes": [_probe(layer, found) for layer in found.probes],
        "select": _select(found, settings, index),
        "test": _test(arms, scenarios, found, index, measured, sampling.seed) if arms else None,
        "guards": {name: _guard(found, setting) for name, setting in found.best.items()},
    }  # fmt: skip


def _settings(
    found: Sweep, settings: Sequence[Setting], sampling: Sampling, command: str, recipe: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "command": command, "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "rules": list(dict.fromkeys(s.rule.name for s in settings)),
        "layers": sorted({layer for s in settings for layer in s.layers}),
        "positions": list(dict.fromkeys(s.positions for s in settings)),
        "seed": sampling.seed, "versions": versions(), "recipe": None if recipe is None else dict(recipe),
        "beside": [guard.digest for guard in found.beside], "constraints": asdict(found.limits),
    }  # fmt: skip


def _probe(layer: int, found: Sweep) -> dict[str, Any]:
    probe = found.probes[layer]
    numbers = ("m", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg", "delta_mu")
    evidence = ("auroc", "auroc_low", "auroc_high", "cohens_d", "split_half", "cosine_mean_difference")
    return {
        "layer": layer, **{key: float(getattr(probe, key)) for key in numbers},
        **{key: float(getattr(probe.evidence, key)) for key in evidence}, "weak": bool(probe.evidence.weak),
    }  # fmt: skip


def _guard(found: Sweep, setting: Setting) -> dict[str, str]:
    guard = found.guard_at(setting)
    return {"digest": guard.digest, "describe": guard.describe()}


# ------------------------------------------------------------------------------------------------ the grid


def _select(found: Sweep, settings: Sequence[Setting], index: Mapping[Setting, int]) -> dict[str, Any]:
    return {
        "n": found.aligned.n, "aligned": asdict(found.aligned), "malicious": asdict(found.malicious),
        "points": [_point(setting, found) for setting in settings],
        "chosen": {
            name: {
                "point": index[setting],
                "wins": found.sure[name].wins if name in found.sure else None,
                "second": _second(found, name, index),
            }
            for name, setting in found.best.items()
        },
        "best": found.winner, "refused": dict(found.refused), "not_looked": found.not_looked,
    }  # fmt: skip


def _second(found: Sweep, name: str, index: Mapping[Setting, int]) -> int | None:
    second = found.sure[name].second if name in found.sure else None
    return None if second is None else index[second]


def _point(setting: Setting, found: Sweep) -> dict[str, Any]:
    figures = found.points[setting] if setting in found.points else found.screened[setting]
    cost = found.costs.get(setting)
    why = _why(setting, figures, found)
    return {
        "rule": setting.rule.name, "strength": setting.rule.strength, "layers": list(setting.layers),
        "positions": setting.positions, "scenarios": figures.n, "figures": asdict(figures),
        "benign": None if cost is None else asdict(cost),
        "eligible": not why, "why": why,
    }  # fmt: skip


def _why(setting: Setting, figures: Figures, found: Sweep) -> str:
    """The constraint that a setting failed; empty if none."""
    if figures.trait is None or figures.coherence is None:
        return "no answer could be scored"
    bar = coherence_bar(found.aligned, found.limits)
    if figures.coherence < bar:
        return f"coherence {figures.coherence:.1f}, the bar is {bar:.1f}"
    cost = found.costs.get(setting)
    if cost is not None and (broken := found.limits.broken(cost)):
        return "; ".join(broken)
    return "" if setting in found.points else f"it answered {figures.n} of {found.aligned.n} scenarios and was left behind"


# ------------------------------------------------------------------------------------------------ the test


def _test(
    arms: Sequence[Arm], scenarios: Sequence[Scenario], found: Sweep, index: Mapping[Setting, int], measured: Measured | None,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    by_name = {arm.name: arm for arm in arms}
    first = next((arm.setting for arm in arms if arm.setting is not None), None)
    edges = _edges([rho for arm in arms for answer in arm.answers for rho in answer.rho])
    return {
        "scenarios": [
            {"id": s.id, "category": s.category, "system": s.negative, "turns": list(s.turns)} for s in scenarios
        ],
        "arms": [
            {
                "name": arm.name, "point": None if arm.setting is None else index.get(arm.setting),
                "trait": _interval(bootstrap_interval([s.trait for s in arm.scores], seed=seed)),
                "coherence": _interval(bootstrap_interval([s.coherence for s in arm.scores], seed=seed)),
                "recovered": None if arm.setting is None else _recovered(by_name, arm, seed),
                "repetition": arm.figures.repetition, "moved": arm.figures.moved, "shift": arm.figures.shift,
                "categories": _categories(arm, scenarios, seed),
                "metrics": {} if measured is None else _metrics(measured, arm.name, seed),
                "projections": _projections(arm, arm.setting or first, found, edges),
                "rows": [_row(arm, i) for i in range(len(arm.answers))],
            }
            for arm in arms
        ],
    }  # fmt: skip


def _recovered(by_name: Mapping[str, Arm], arm: Arm, seed: int) -> dict[str, Any] | None:
    traits = [[score.trait for score in by_name[name].scores] for name in ("malicious", "aligned", arm.name)]
    return _interval(recovered_interval(*traits, seed=seed))


def _categories(arm: Arm, scenarios: Sequence[Scenario], seed: int) -> list[dict[str, Any]]:
    scores: dict[str, list[float | None]] = {}
    for scenario, score in zip(scenarios, arm.scores, strict=True):
        scores.setdefault(scenario.category, []).append(score.trait)
    return [{"category": name, "trait": _interval(bootstrap_interval(own, seed=seed))} for name, own in scores.items()]


def _metrics(measured: Measured, arm: str, seed: int) -> dict[str, Any]:
    return {
        name: {
            "value": _interval(measured.interval(arm, name, seed=seed)),
            "against_aligned": None if arm == measured.baseline else _interval(measured.difference(arm, name, seed=seed)),
        }
        for name in measured.values[arm]
    }


def _edges(rho: Sequence[float]) -> list[float]:
    """Bins that hold all projections of all arms, the far ones in the outermost."""
    if not rho:
        return []
    low, high = np.percentile(rho, [TAIL, 100 - TAIL])
    return [float(edge) for edge in np.linspace(low, high if high > low else low + 1, BINS + 1)]


def _projections(arm: Arm, setting: Setting | None, found: Sweep, edges: Sequence[float]) -> dict[str, Any] | None:
    """Where the arm's tokens, prompts and answers, stood on the direction of its guard's first layer before correction."""
    if setting is None or not edges:
        return None
    probe = found.probes[setting.layers[0]]
    rho = np.array([value for answer in arm.answers for value in answer.rho])
    moved = np.array([value != 0 for answer in arm.answers for value in answer.delta], bool)
    inside = np.clip(rho, edges[0], edges[-1])
    return {
        "layer": setting.layers[0], "m": float(probe.m), "mu_pos": float(probe.mu_pos), "mu_neg": float(probe.mu_neg),
        "edges": list(edges), "seen": np.histogram(inside, edges)[0].tolist(),
        "moved": np.histogram(inside[moved], edges)[0].tolist(),
    }  # fmt: skip


def _row(arm: Arm, i: int) -> dict[str, Any]:
    score, answer = arm.scores[i], arm.answers[i]
    start = max(len(answer.rho) + 1 - answer.n, 0)  # the last token drawn is never read
    tokens = [
        [piece, rho, delta]
        for piece, rho, delta in zip(answer.pieces, answer.rho[start:], answer.delta[start:], strict=False)
    ]
    return {
        "trait": score.trait, "coherence": score.coherence, "note": score.note, "text": answer.text,
        "tokens": tokens if answer.rho else None,
    }  # fmt: skip


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None or not math.isfinite(interval.mean):
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n, "unscored": interval.unscored}
