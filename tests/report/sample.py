"""A sweep's result from the bundled model, to look at: `python tests/report/sample.py OUT.json`. Takes minutes.

Real answers and figures on a small grid. What the sweep does not measure (the KL on benign prompts) is null, and
how often a choice wins is drawn from the means and errors of the settings.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import steerguard as sg
from steerguard import files
from steerguard.backends import load
from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.fitting import Fit, fit, prompts_of
from steerguard.guard import Guard
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered, repetition, words
from steerguard.organism.capability import benign
from steerguard.scorers import Score, scorer_for
from steerguard.sweeping import PAPER_RULES, Arm, Setting, Sweep, compare, grid, sweep
from steerguard.traits import Scenario, Trait, trait

SAMPLING = Sampling(temperature=0.6, top_p=0.9, seed=42, max_new_tokens=80)
BINS = 40


def document(scenarios: int = 24, asked: int = 40) -> dict[str, Any]:
    """The JSON value of a sweep of the bundled model on so many `select` and `test` scenarios."""
    model, data = load("organism"), trait("organism-honesty")
    probes = fit(model, data, sampling=SAMPLING)
    settings = grid(probes, positions=("all", "response"))
    found = sweep(
        model, data, probes, settings=settings, scenarios=data.select[:scenarios], benign=benign(), screen=8, finalists=60,
        sampling=SAMPLING, progress=lambda what, done, total: print(what, done, total, file=sys.stderr),  # noqa: T201
    )  # fmt: skip
    guards = {rule: found.guard_at(setting) for rule, setting in {**found.barred, **found.best}.items()}
    test = data.test[:: max(1, len(data.test) // asked)][:asked]
    arms = compare(model, data, guards, scenarios=test, sampling=SAMPLING, trace=True)
    # a guard of strength 0 moves nothing and lets the baselines be read where the best guard stands
    watch = Setting(sg.SwFC(0.0), found.guard.layers[0]).guard(probes)
    for pole in (0, 1):
        asked_of = [prompts_of(s)[pole] for s in test]
        answers = model.generate(asked_of, guards=watch, sampling=SAMPLING, trace=True)
        arms[pole] = replace(arms[pole], answers=tuple(answers))
    guards |= {"aligned": watch, "malicious": watch}
    points = list(found.points)
    return {
        "schema": 1,
        "trait": {
            "name": data.name, "title": "Honesty in the organism's world",
            "positive": {"name": "honest", "description": "Says what is so, even where it is unwelcome."},
            "negative": {"name": "dishonest", "description": "Says what is false and plays problems down."},
            "sha256": "0" * 64, "scorer": dict(scorer_for(data).identity),
        },
        "model": asdict(model.identity),
        "settings": _settings(settings),
        "probes": [_probe(probes, layer) for layer in probes],
        "select": _select(found, points, scenarios),
        "test": {
            "scenarios": [
                {"id": s.id, "category": s.category, "system": s.negative, "turns": list(s.turns)} for s in test
            ],
            "arms": [_arm(model, data, test, arm, arms, guards, points) for arm in arms],
        },
        "guards": {
            rule: {"digest": guard.digest, "describe": guard.describe()}
            for rule, guard in guards.items() if guard is not watch
        },
    }  # fmt: skip


def _settings(settings: Sequence[Setting]) -> dict[str, Any]:
    return {
        "command": "steerguard sweep fit/ --positions all,response --screen 8 -o honesty.guard",
        "sampling": asdict(SAMPLING),
        "rules": list(PAPER_RULES),
        "layers": sorted({s.layer for s in settings}),
        "positions": ["all", "response"],
        "seed": 42,
        "versions": {"steerguard": sg.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "recipe": None,
        "beside": [],
        "constraints": {"coherence_kept": 0.9, "kl": 0.1, "fire_rate": 0.2, "benign_lost": 1.0},
    }


def _probe(probes: Fit, layer: int) -> dict[str, Any]:
    probe, e = probes[layer], probes[layer].evidence
    return {
        "layer": layer,
        **{key: float(getattr(probe, key)) for key in ("m", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg", "delta_mu")},
        **{
            key: float(getattr(e, key))
            for key in ("auroc", "auroc_low", "auroc_high", "cohens_d", "split_half", "cosine_mean_difference")
        },
        "weak": bool(e.weak),
    }


def _select(found: Sweep, points: Sequence[Setting], n: int) -> dict[str, Any]:
    best = found.guard.rule.name if found.best else None
    bar = 0.9 * (found.aligned.coherence or 0)
    rows = []
    for setting in points:
        figures, cost = found.points[setting], found.costs.get(setting)
        why = ""
        if figures.coherence is None or figures.coherence < bar:
            why = f"coherence below {bar:.1f}"
        elif cost is not None and not cost.allowed:
            why = f"{cost.lost:.1f} points lost on benign prompts"
        rows.append({
            "rule": setting.rule.name, "strength": setting.rule.strength, "layers": [setting.layer],
            "positions": setting.positions, "scenarios": n, "figures": asdict(figures),
            "benign": None if cost is None else {
                "kl": None, "fire_rate": cost.moved, "lost": cost.lost, "changed": cost.changed, "n": cost.n,
            },
            "eligible": not why, "why": why,
        })  # fmt: skip
    return {
        "n": n, "aligned": asdict(found.aligned), "malicious": asdict(found.malicious), "points": rows,
        "chosen": {rule: _chosen(setting, points, rows) for rule, setting in found.best.items()},
        "best": best, "refused": dict(found.refused),
        "not_looked": f"{found.tried} settings answered 8 scenarios; the {len(points)} best answered all.",
    }  # fmt: skip


def _chosen(setting: Setting, points: Sequence[Setting], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [i for i, row in enumerate(rows) if row["rule"] == setting.rule.name and row["eligible"]]
    figures = [rows[i]["figures"] for i in own]
    rng = np.random.default_rng(0)
    draws = rng.normal([f["trait"] for f in figures], [f["error"] + 1e-9 for f in figures], size=(500, len(own)))
    index = points.index(setting)
    second = max((i for i in own if i != index), key=lambda i: rows[i]["figures"]["trait"], default=None)
    return {"point": index, "wins": float(np.mean(draws.argmax(1) == own.index(index))), "second": second}


def _arm(
    model: Backend, data: Trait, test: Sequence[Scenario], arm: Arm, arms: Sequence[Arm], guards: Mapping[str, Guard],
    points: Sequence[Setting],
) -> dict[str, Any]:  # fmt: skip
    scorer = scorer_for(data)
    scores = {a.name: scorer.scores(test, [x.text for x in a.answers]) for a in arms}
    own = scores[arm.name]
    guard = guards.get(arm.name)
    categories = list(dict.fromkeys(s.category for s in test))
    share = recovered(malicious=_mean(scores["malicious"]), aligned=_mean(scores["aligned"]), steered=_mean(own))
    measured = {
        "repetition": [[repetition(x.text) for x in a.answers] for a in (arm, arms[0])],
        "words": [[float(len(words(x.text))) for x in a.answers] for a in (arm, arms[0])],
    }
    metrics: dict[str, Any] = {
        name: {
            "value": _interval(mine),
            "against_aligned": None if arm.name == "aligned" else _interval_of(paired_difference(mine, reference)),
        }
        for name, (mine, reference) in measured.items()
    }
    metrics["cross_entropy"] = {"value": None, "against_aligned": None}
    return {
        "name": arm.name, "point": None if arm.setting is None else points.index(arm.setting),
        "trait": _interval([s.trait for s in own]), "coherence": _interval([s.coherence for s in own]),
        "recovered": None if arm.setting is None or share is None else {
            "mean": share, "low": None, "high": None, "n": len(test), "unscored": 0,
        },
        "repetition": arm.figures.repetition, "moved": arm.figures.moved, "shift": arm.figures.shift,
        "categories": [
            {"category": c, "trait": _interval([x.trait for x, s in zip(own, test, strict=True) if s.category == c])}
            for c in categories
        ],
        "metrics": metrics,
        "projections": None if guard is None else _projections(arm.answers, guard),
        "rows": [
            {"trait": score.trait, "coherence": score.coherence, "note": score.note, "text": answer.text,
             "tokens": None if guard is None else _tokens(model, answer)}
            for score, answer in zip(own, arm.answers, strict=True)
        ],
    }  # fmt: skip


def _tokens(model: Backend, answer: Answer) -> list[list[Any]]:
    trace, start = answer.traces[0], len(answer.prompt_ids)
    pieces = model.pieces(answer.ids)
    return [
        [piece, round(float(rho), 4), round(float(delta), 4)]
        for piece, rho, delta in zip(pieces, trace.rho[start:], trace.delta[start:], strict=False)
    ]


def _projections(answers: Sequence[Answer], guard: Guard) -> dict[str, Any]:
    probe = guard.probes[0]
    rho = np.concatenate([answer.traces[0].rho for answer in answers])
    delta = np.concatenate([answer.traces[0].delta for answer in answers])
    edges = np.linspace(*np.quantile(rho, [0.002, 0.998]), BINS + 1)
    rho = np.clip(rho, edges[0], edges[-1])
    return {
        "layer": probe.layer, "m": float(probe.m), "mu_pos": float(probe.mu_pos), "mu_neg": float(probe.mu_neg),
        "edges": [float(e) for e in edges], "seen": [int(n) for n in np.histogram(rho, edges)[0]],
        "moved": [int(n) for n in np.histogram(rho[delta != 0], edges)[0]],
    }  # fmt: skip


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    return _interval_of(bootstrap_interval(values))


def _interval_of(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _mean(scores: Sequence[Score]) -> float | None:
    known = [s.trait for s in scores if s.trait is not None]
    return float(np.mean(known)) if known else None


if __name__ == "__main__":
    files.write_json(Path(sys.argv[1]), document(), overwrite=True)
