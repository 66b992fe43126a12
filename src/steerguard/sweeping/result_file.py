"""A sweep's result as a file: one JSON document, read without trust.

What this module knows: every key of the document, what each may hold, and that its parts fit together (a choice that
points at a setting that is there, as many answers as scenarios). A broken, foreign or newer file is refused in one
sentence.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from steerguard import files
from steerguard.errors import InputError, ResultError
from steerguard.files import Kind, Malformed
from steerguard.identity import read_identity
from steerguard.metrics import Interval
from steerguard.sweeping.result import (
    BASELINES,
    Asked,
    Category,
    Chosen,
    Cost,
    Figures,
    GuardRecord,
    HeldOut,
    LayerEvidence,
    Limits,
    Metric,
    Point,
    Pole,
    Projections,
    Row,
    Selection,
    Settings,
    SweepResult,
    SweptTrait,
    TestedArm,
    Token,
)

SCHEMA = 1
MAX_RESULT = 256 * 2**20
"""Bytes of a result that are read: 500 answers with every token's projection are about 20 MiB."""

_NULL = type(None)
_NUMBER: Kind = (float, _NULL)


def read(path: str | os.PathLike[str]) -> SweepResult:
    """The result in a file.

    Raises:
        ResultError: a file that is not there, is damaged, or is no result of a sweep, with the path and one sentence.
    """
    data = files.read_bounded(path, limit=MAX_RESULT, error=ResultError)
    try:
        return of(files.strict_json(data))
    except Malformed as cause:
        raise ResultError(f"{path} {cause}") from cause


def of(record: object) -> SweepResult:
    """The result in a JSON value. Raises Malformed: one clause that follows the file's name."""
    if not isinstance(record, dict) or "schema" not in record:
        raise Malformed("is no result of a sweep: it must be an object with the key 'schema'")
    if record["schema"] != SCHEMA or isinstance(record["schema"], bool):
        got = files.shown(record["schema"])
        raise Malformed(f"has the schema {got}, this version reads {SCHEMA}; use the steerguard that wrote it")
    try:
        return _result(record)
    except Malformed as cause:
        raise Malformed(f"is no sound result of a sweep: {cause}") from cause
    except InputError as cause:  # an identity that contradicts itself
        raise Malformed(f"is no sound result of a sweep: {cause}") from cause


def _result(record: dict[str, Any]) -> SweepResult:
    top = files.take(record, "the result", {
        "schema": int, "trait": dict, "model": dict, "settings": dict, "probes": list, "select": dict,
        "test": (dict, _NULL), "guards": dict,
    })  # fmt: skip
    select = _selection(top["select"])
    rules = {point.rule for point in select.points}
    found = {"digest": str, "describe": str}
    return SweepResult(
        trait=_trait(top["trait"]),
        model=read_identity(top["model"]),
        settings=_settings(top["settings"]),
        probes=tuple(_evidence(one, f"probe {i}") for i, one in enumerate(top["probes"])),
        select=select,
        test=None if top["test"] is None else _held_out(top["test"], len(select.points), rules),
        guards={
            _one_of(rule, rules, "a guard's rule"): GuardRecord(**files.take(one, f"the guard of {files.shown(rule)}", found))
            for rule, one in top["guards"].items()
        },
    )


def _trait(value: object) -> SweptTrait:
    kinds: dict[str, Kind] = {
        "name": str, "title": str, "positive": dict, "negative": dict, "sha256": str, "scorer": dict,
    }  # fmt: skip
    found = files.take(value, "the trait", kinds)
    poles = {
        pole: Pole(**files.take(found[pole], f"the trait's {pole} pole", {"name": str, "description": str}))
        for pole in ("positive", "negative")
    }
    return SweptTrait(**{**found, **poles})


def _settings(value: object) -> Settings:
    found = files.take(value, "the settings", {
        "command": str, "sampling": dict, "rules": list, "layers": list, "positions": list, "seed": int, "versions": dict,
        "recipe": (dict, _NULL), "beside": list, "constraints": dict,
    })  # fmt: skip
    limits = files.take(found["constraints"], "the constraints", {
        "coherence_kept": float, "kl": _NUMBER, "fire_rate": _NUMBER, "benign_lost": _NUMBER,
    })  # fmt: skip
    lists = {key: _all(found[key], f"{key!r} of the settings", str) for key in ("rules", "positions", "beside")}
    layers = _all(found["layers"], "'layers' of the settings", int)
    return Settings(**{**found, **lists, "layers": layers, "constraints": Limits(**limits)})


_EVIDENCE: dict[str, Kind] = {
    "layer": int, "m": float, "mu_pos": float, "sigma_pos": float, "mu_neg": float, "sigma_neg": float, "delta_mu": float,
    "auroc": float, "auroc_low": float, "auroc_high": float, "cohens_d": float, "split_half": float,
    "cosine_mean_difference": float, "weak": bool,
}  # fmt: skip


def _evidence(value: object, what: str) -> LayerEvidence:
    return LayerEvidence(**files.take(value, what, _EVIDENCE))


_FIGURES: dict[str, Kind] = {
    "trait": _NUMBER, "coherence": _NUMBER, "repetition": float, "moved": float, "shift": float, "n": int, "unscored": int,
    "error": float,
}  # fmt: skip


def _figures(value: object, what: str) -> Figures:
    found = files.take(value, what, _FIGURES)
    _within(found, what, 100.0, "trait", "coherence")
    _within(found, what, 1.0, "repetition", "moved")
    if not 0 <= found["unscored"] <= found["n"]:
        raise Malformed(f"{what} has {found['unscored']} unscored of {found['n']} answers")
    return Figures(**found)


def _selection(value: object) -> Selection:
    found = files.take(value, "the selection", {
        "n": int, "aligned": dict, "malicious": dict, "points": list, "chosen": dict, "best": (str, _NULL), "refused": dict,
        "not_looked": str,
    })  # fmt: skip
    points = tuple(_point(one, f"point {i}") for i, one in enumerate(found["points"]))
    rules = {point.rule for point in points}
    chosen = {_one_of(rule, rules, "a chosen rule"): _chosen(one, rule, points) for rule, one in found["chosen"].items()}
    if found["best"] is not None:
        _one_of(found["best"], chosen, "the best rule")
    for rule, why in found["refused"].items():
        files.of_kind(why, f"the reason why {files.shown(rule)} was refused", str)
    baselines = {name: _figures(found[name], f"the figures of {name!r}") for name in BASELINES}
    return Selection(**{**found, **baselines, "points": points, "chosen": chosen})


_POINT: dict[str, Kind] = {
    "rule": str, "strength": _NUMBER, "layers": list, "positions": str, "scenarios": int, "figures": dict,
    "benign": (dict, _NULL), "eligible": bool, "why": str,
}  # fmt: skip
_BENIGN: dict[str, Kind] = {"gated": bool, "kl": _NUMBER, "fire_rate": _NUMBER, "lost": _NUMBER, "changed": _NUMBER, "n": int}


def _point(value: object, what: str) -> Point:
    found = files.take(value, what, _POINT)
    if found["rule"] in BASELINES:
        raise Malformed(f"{what} has the rule {found['rule']!r}, which is the name of a baseline")
    found["layers"] = _all(found["layers"], f"'layers' of {what}", int)
    if not found["layers"]:
        raise Malformed(f"{what} has no layer")
    found["figures"] = _figures(found["figures"], f"the figures of {what}")
    if found["benign"] is not None:
        benign = files.take(found["benign"], f"'benign' of {what}", _BENIGN)
        _within(benign, f"'benign' of {what}", 1.0, "fire_rate", "changed")
        found["benign"] = Cost(**benign)
    return Point(**found)


def _chosen(value: object, rule: str, points: tuple[Point, ...]) -> Chosen:
    what = f"the choice of {files.shown(rule)}"
    found = files.take(value, what, {"point": int, "wins": _NUMBER, "second": (int, _NULL)})
    _within(found, what, 1.0, "wins")
    for key in ("point", "second"):
        _index(found[key], len(points), f"{key!r} of {what}")
    if points[found["point"]].rule != rule:
        raise Malformed(f"{what} is a point of {files.shown(points[found['point']].rule)}")
    return Chosen(**found)


def _held_out(value: object, points: int, rules: set[str]) -> HeldOut:
    found = files.take(value, "the test", {"scenarios": list, "arms": list})
    asked = {"id": str, "category": str, "system": str, "turns": list}
    scenarios = []
    for i, one in enumerate(found["scenarios"]):
        scenario = files.take(one, f"scenario {i}", asked)
        scenarios.append(Asked(**{**scenario, "turns": _all(scenario["turns"], f"'turns' of scenario {i}", str)}))
    arms = tuple(_arm(one, i, len(scenarios), points) for i, one in enumerate(found["arms"]))
    names = [_one_of(arm.name, {*BASELINES, *rules}, "an arm's name") for arm in arms]
    if len(set(names)) < len(names):
        raise Malformed(f"the test has two arms of one name among {files.shown(names)}")
    return HeldOut(tuple(scenarios), arms)


_ARM: dict[str, Kind] = {
    "name": str, "point": (int, _NULL), "trait": (dict, _NULL), "coherence": (dict, _NULL), "recovered": (dict, _NULL),
    "repetition": float, "moved": float, "shift": float, "categories": list, "metrics": dict, "projections": (dict, _NULL),
    "rows": list,
}  # fmt: skip


def _arm(value: object, i: int, scenarios: int, points: int) -> TestedArm:
    what = f"arm {i}"
    found = files.take(value, what, _ARM)
    what = f"the arm {files.shown(found['name'])}"
    _within(found, what, 1.0, "repetition", "moved")
    _index(found["point"], points, f"'point' of {what}")
    if len(found["rows"]) != scenarios:
        raise Malformed(f"{what} has {len(found['rows'])} answers to {scenarios} scenarios")
    for key in ("trait", "coherence", "recovered"):
        found[key] = _interval(found[key], f"{key!r} of {what}")
    categories = []
    for one in found["categories"]:
        category = files.take(one, f"a category of {what}", {"category": str, "trait": (dict, _NULL)})
        categories.append(Category(category["category"], _interval(category["trait"], f"a category's trait of {what}")))
    metrics = {}
    for name, one in found["metrics"].items():
        label = f"the metric {files.shown(name)} of {what}"
        metric = files.take(one, label, {"value": (dict, _NULL), "against_aligned": (dict, _NULL)})
        metrics[name] = Metric(**{key: _interval(part, f"{key!r} of {label}") for key, part in metric.items()})
    return TestedArm(**{
        **found, "categories": tuple(categories), "metrics": metrics,
        "projections": _projections(found["projections"], f"the projections of {what}"),
        "rows": tuple(_row(row, f"answer {j} of {what}") for j, row in enumerate(found["rows"])),
    })  # fmt: skip


def _interval(value: object, what: str) -> Interval | None:
    if value is None:
        return None
    found = files.take(value, what, {"mean": float, "low": _NUMBER, "high": _NUMBER, "n": int, "unscored": int})
    if found["low"] is not None and found["high"] is not None and found["low"] > found["high"]:
        raise Malformed(f"{what} has an interval from {found['low']} to {found['high']}")
    return Interval(**found)


_PROJECTIONS: dict[str, Kind] = {
    "layer": int, "m": float, "mu_pos": float, "mu_neg": float, "edges": list, "seen": list, "moved": list,
}  # fmt: skip


def _projections(value: object, what: str) -> Projections | None:
    if value is None:
        return None
    found = files.take(value, what, _PROJECTIONS)
    edges = _all(found["edges"], f"'edges' of {what}", float)
    seen, moved = (_all(found[key], f"{key!r} of {what}", int) for key in ("seen", "moved"))
    if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):
        raise Malformed(f"'edges' of {what} must be at least two numbers that ascend, got {files.shown(edges)}")
    if not len(seen) == len(moved) == len(edges) - 1:
        raise Malformed(f"{what} have {len(edges)} edges, {len(seen)} bins seen and {len(moved)} moved")
    if any(not 0 <= m <= s for m, s in zip(moved, seen, strict=True)):
        raise Malformed(f"{what} have a bin with more tokens moved than seen")
    return Projections(**{**found, "edges": edges, "seen": seen, "moved": moved})


_ROW: dict[str, Kind] = {"trait": _NUMBER, "coherence": _NUMBER, "note": str, "text": str, "tokens": (list, _NULL)}


def _row(value: object, what: str) -> Row:
    found = files.take(value, what, _ROW)
    _within(found, what, 100.0, "trait", "coherence")
    tokens = found["tokens"]
    return Row(**{**found, "tokens": None if tokens is None else tuple(_token(token, what) for token in tokens)})


def _token(value: object, what: str) -> Token:
    if isinstance(value, list) and len(value) == 3:
        piece, rho, delta = value
        numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in (rho, delta))
        if isinstance(piece, str) and numbers:
            return Token(piece, float(rho), float(delta))
    raise Malformed(f"a token of {what} must be [text, projection, shift], got {files.shown(value)}")


# ----------------------------------------------------------------------------------------------- what fits together


def _all(values: list[Any], what: str, kind: type) -> tuple[Any, ...]:
    return tuple(files.of_kind(value, f"an entry of {what}", kind) for value in values)


def _within(found: Mapping[str, Any], what: str, top: float, *keys: str) -> None:
    for key in keys:
        if found[key] is not None and not 0 <= found[key] <= top:
            raise Malformed(f"{key!r} of {what} must be from 0 to {top:g}, got {files.shown(found[key])}")


def _index(value: int | None, n: int, what: str) -> None:
    if value is not None and not 0 <= value < n:
        raise Malformed(f"{what} is {value}, there are {n} points")


def _one_of(name: str, allowed: Collection[str], what: str) -> str:
    if name not in allowed:
        raise Malformed(f"{what} is {files.shown(name)}, there are {', '.join(sorted(map(files.shown, allowed))) or 'none'}")
    return name
