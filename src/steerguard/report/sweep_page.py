"""The page of a sweep: one HTML file that works offline, prints, and asks for nothing from anywhere.

What this module knows: what stands on the page and in which order. It formats figures and computes none but shares of
them. Answers, prompts, notes and names are hostile text: templates escape by themselves, and the page's policy lets
neither scripts run nor anything be fetched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steerguard import files
from steerguard.probe import ranges
from steerguard.report import answers, bars, curves, headline, svg, tables, wording
from steerguard.sweeping.result import BASELINES, Limits, Point, SweepResult

OPEN = 12
"""How many of the worst scenarios are shown unfolded."""


def page(result: SweepResult) -> str:
    """The whole page as HTML."""
    return _environment().get_template("sweep.html.j2").render(_content(result))


def write_report(result: SweepResult, path: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, Path, Path]:
    """Write the page to `path`, and beside it the same as CSV: `NAME-points.csv` and `NAME-answers.csv`.

    Returns:
        The three paths.

    Raises:
        OutputExists: one of the three exists and `overwrite` is not set; nothing was written.
        InputError: a path that cannot be written.
    """
    target = Path(path)
    written = (
        (target, page(result)),
        (target.with_name(f"{target.stem}-points.csv"), tables.csv_points(result)),
        (target.with_name(f"{target.stem}-answers.csv"), tables.csv_answers(result)),
    )
    for place, _ in written:
        files.refuse_existing(place, overwrite=overwrite)
    first, second, third = (files.write_atomically(place, text.encode(), overwrite=overwrite) for place, text in written)
    return first, second, third


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("steerguard.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "visible": answers.visible, "number": wording.number, "signed": wording.signed, "percent": wording.percent,
        "compact": wording.compact, "span": wording.span, "ends": wording.ends, "counted": wording.counted,
        "setting": wording.setting, "short": wording.short,
    }  # fmt: skip
    return environment


def _content(result: SweepResult) -> dict[str, Any]:
    """Everything that the template shows."""
    looks = curves.looks(result)
    best = result.select.best
    return {
        "result": result, "select": result.select, "test": result.test, "best": best, "looks": looks, "headline": headline,
        "point": headline.best_point(result), "open": OPEN, "baselines": BASELINES,
        "gap": _both(lambda width: _gap(result, looks, width)),
        "positions": list(dict.fromkeys(point.positions for point in result.select.points)),
        "layer_curves": lambda positions: _both(lambda width: curves.layer_curves(result, positions, width)),
        "pareto": _both(lambda width: curves.pareto(result, width)),
        "partly": headline.parts_answered(result.select.points, result.select.n),
        "several_layers": sum(len(point.layers) > 1 for point in result.select.points),
        "maps": _maps(result),
        "in_order": _in_order(result.select.points, list(looks)),
        "ramp": [svg.ramp(i / 10) for i in range(11)],
        "record": _record(result),
        **_tested(result, looks),
    }  # fmt: skip


def _both(draw: Callable[[int], Markup]) -> Markup:
    """A picture for wide pages and one for phones; the style sheet shows the one that fits."""
    wide, narrow = draw(curves.WIDE), draw(curves.NARROW)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)


def _gap(result: SweepResult, looks: Mapping[str, curves.Look], width: int) -> Markup:
    best, test = result.select.best, result.test
    if best is None or test is None or test.arm(best) is None:
        return Markup("")
    arms = [(name, arm.trait) for name in ("malicious", "aligned", best) if (arm := test.arm(name)) is not None]
    return bars.gap(arms, looks[best].colour, width) if any(trait for _, trait in arms) else Markup("")


def _maps(result: SweepResult) -> list[tuple[str, str, Markup]]:
    """(rule, positions, map) of every pair that has points."""
    pairs = dict.fromkeys((point.rule, point.positions) for point in result.select.points if len(point.layers) == 1)
    order = list(curves.looks(result))
    return [
        (rule, positions, curves.heat_map(result, rule, positions))
        for rule, positions in sorted(pairs, key=lambda pair: order.index(pair[0]))
    ]


def _in_order(points: Sequence[Point], rules: Sequence[str]) -> list[Point]:
    """By rule, positions, layers and strength, in whichever order they were tried."""

    def place(point: Point) -> tuple[int, str, tuple[int, ...], float]:
        return rules.index(point.rule), point.positions, point.layers, -math.inf if point.strength is None else point.strength

    return sorted(points, key=place)


def _tested(result: SweepResult, looks: Mapping[str, curves.Look]) -> dict[str, Any]:
    """What the sections on the test scenarios show; empty lists where there was no test."""
    test, best = result.test, result.select.best
    if test is None:
        return {"histograms": [], "categories": [], "metrics": [], "scenarios": [], "reliability": None}
    guarded = best if test.arm(best) is not None else None
    read = [(arm, arm.projections) for arm in test.arms if arm.projections is not None]
    ends = bars.shared_ends([found for _, found in read])
    scenarios = answers.worst_first(test, guarded)
    changes = [(s.asked.id, s.change) for s in scenarios if s.change is not None]
    categories = dict.fromkeys(part.category for arm in test.arms for part in arm.categories)
    budget = answers.Budget()
    return {
        "histograms": [
            (arm, found, bars.projections(found, bars.look_of(arm.name, looks), ends[found.layer], arm.name))
            for arm, found in read
        ],
        "categories": [(name, bars.category(name, test.arms, looks)) for name in categories],
        "metrics": list(dict.fromkeys(name for arm in test.arms for name in arm.metrics)),
        "scenarios": scenarios,
        "too_many_tokens": sum(len(row.tokens or ()) for arm, _ in read for row in arm.rows) > answers.HOVER_TOKENS,
        "reliability": None if guarded is None else answers.reliability(scenarios, guarded),
        "changes": _both(lambda width: bars.changes(changes, looks[best].colour if best else "", width)) if changes else "",
        "look_of": lambda name: bars.look_of(name, looks),
        "tokens": lambda arm, row: answers.tokens(row, arm.projections, budget),
    }  # fmt: skip


def _record(result: SweepResult) -> list[tuple[str, str]]:
    """Every setting that is needed to do it again: a name and its value, JSON where it has parts."""
    settings, trait, model = result.settings, result.trait, result.model
    sampling = ", ".join(f"{key} {_json(value)}" for key, value in settings.sampling.items())
    versions = ", ".join(f"{key} {value if isinstance(value, str) else _json(value)}" for key, value in settings.versions.items())
    return [
        ("model", f"{model.name}: {model.architecture}, width {model.width}, depth {model.depth}"),
        ("weights, SHA-256 of a few", ", ".join(f"{name} {digest[:12]}" for name, digest in model.weights.items())),
        ("tokenizer, SHA-256", model.tokenizer or "none"),
        ("chat template, SHA-256", model.chat_template or "none"),
        ("trait", f"{trait.name}: {trait.title}"),
        ("trait, SHA-256", trait.sha256),
        (f"positive pole, {trait.positive.name}", trait.positive.description),
        (f"negative pole, {trait.negative.name}", trait.negative.description),
        ("scorer", _json(trait.scorer)),
        ("sampling", sampling or "none"),
        ("seed", str(settings.seed)),
        ("rules", ", ".join(settings.rules)),
        ("layers", ranges(list(settings.layers)) or "none"),
        ("positions", ", ".join(settings.positions)),
        ("limits", _limits(settings.constraints)),
        ("always on beside", ", ".join(settings.beside) or "no other guard"),
        ("recipe", "none" if settings.recipe is None else _json(settings.recipe)),
        ("versions", versions or "none"),
    ]


def _limits(limits: Limits) -> str:
    parts = [f"coherence at least {wording.percent(limits.coherence_kept)} of the aligned"]
    parts += [] if limits.kl is None else [f"benign KL at most {wording.compact(limits.kl)}"]
    parts += [] if limits.fire_rate is None else [f"fire rate on benign tokens at most {wording.percent(limits.fire_rate)}"]
    if limits.benign_lost is not None:
        parts.append(f"at most {wording.compact(limits.benign_lost)} points lost on benign prompts")
    return "; ".join(parts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)
