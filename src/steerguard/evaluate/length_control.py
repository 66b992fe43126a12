"""Length-controlled win rates: what share of comparisons would be won if both answers were equally long.

Judges like length. A logistic model explains each preference by three terms: the model that answered, how hard the
instruction is, and the difference in length, tanh(delta / std); the win rate is what it predicts with the length term at 0.

    P(guarded is preferred) = sigmoid(model + difficulty * d_i + length * tanh((len_unguarded - len_guarded) / std))

Fitted as AlpacaEval 2 fits it: an L1 penalty, no intercept beside the model's term, ties as half a win. Difficulties and the
comparisons of artificially shortened and lengthened baselines that AlpacaEval regularises with are its data: with its file
`df_gamed.csv`, this is its `length_controlled_v1`, the strength of the penalty chosen by cross-validation over five folds
among ten. Without it, the terms that need none are left, and a weak penalty: cross-validation would, for a hundred
comparisons or fewer, often choose a penalty that makes every guard look exactly as good as none.

Numbers in, numbers out. It knows no model and no judge.

Source: Dubois et al. 2024, arXiv 2404.04475.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerguard import files
from steerguard.errors import InputError
from steerguard.metrics import LEVEL, Interval

Floats = npt.NDArray[np.float64]

STRENGTHS = tuple(float(c) for c in np.logspace(-4, 4, 10))
"""Inverse strengths of the penalty among which cross-validation chooses."""
FOLDS = 5
WEAK = 100.0
"""The inverse strength of a penalty that hardly matters: AlpacaEval's own where it does not cross-validate. Intervals are never
drawn with a stronger one: they would be too narrow."""
GAMED_WEIGHT = 0.2 / 2
"""What one comparison of a gamed baseline counts; there are two such baselines."""
RESAMPLES = 1000
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Gamed:
    """AlpacaEval's comparisons of gamed baselines, from its `df_gamed.csv`."""

    difficulty: Mapping[int, float]
    "of each instruction, by its number"
    features: Floats
    "[n, 3] as `_features` has them"
    preference: Floats
    "[n] 0 to 1"


@dataclass(frozen=True)
class LengthControlled:
    """A win rate with the length term at 0, and the model that it comes from."""

    win_rate: Interval
    "percent, with its bootstrap interval over instructions; 50 is no difference"
    weights: Mapping[str, float]
    "of the terms `length`, `difficulty` (where there are difficulties) and `model`"
    strength: float
    "inverse strength of the penalty that was chosen"
    regularised: bool
    "whether comparisons of gamed baselines took part"


def read_gamed(path: str | os.PathLike[str]) -> Gamed:
    """AlpacaEval's `df_gamed.csv`, or a file of its columns. Raises InputError for anything else."""
    data = files.read_bounded(path, limit=MAX_BYTES, error=InputError)
    difficulty: dict[int, float] = {}
    features, preference = [], []
    names = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    reader = csv.DictReader(io.StringIO(data.decode("utf-8", "replace")))
    if not set(names) <= set(reader.fieldnames or ()):
        raise InputError(f"{path} must have the columns {', '.join(names)}, got {', '.join(reader.fieldnames or ()) or 'none'}")
    for line, row in enumerate(reader, 2):
        try:
            number, preferred, delta, hard = int(row["index"]), *(float(row[name]) for name in names[1:4])
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}:{line}: {error}") from error
        if not all(map(math.isfinite, (preferred, delta, hard))) or not 0 <= preferred <= 1:
            raise InputError(f"{path}:{line}: numbers must be finite and a preference 0 to 1, got {preferred}, {delta}, {hard}")
        difficulty.setdefault(number, hard)
        features.append([math.tanh(delta), hard, float(row["not_gamed_baseline"].strip().lower() in ("true", "1", "1.0"))])
        preference.append(preferred)
    return Gamed(difficulty, np.array(features, np.float64).reshape(-1, 3), np.array(preference, np.float64))


def length_controlled(
    preference: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    *,
    instructions: Sequence[int] | None = None,
    gamed: Gamed | None = None,
    cross_validated: bool | None = None,
    seed: int = 42,
    resamples: int = RESAMPLES,
) -> LengthControlled | None:
    """The win rate with the length term at 0; None if nothing was scored.

    Args:
        preference: of each comparison, how far the guarded answer was preferred, 0 to 1; None: unscored.
        lengths: characters of the unguarded and of the guarded answer.
        instructions: the number of each instruction in AlpacaEval's data, by default its place; read with `gamed` only.
        gamed: what AlpacaEval regularises with, and the difficulties.
        cross_validated: whether the penalty is chosen by cross-validation; by default with `gamed` only.

    Raises:
        InputError: another number of lengths, preferences out of range, or an instruction of unknown difficulty.
    """
    if len(preference) != len(lengths) or any(p is not None and not 0 <= p <= 1 for p in preference):
        raise InputError("every comparison needs two lengths and a preference from 0 to 1, or None")
    kept = [i for i, p in enumerate(preference) if p is not None]
    if not kept:
        return None
    y = np.array([preference[i] for i in kept], np.float64)
    delta = np.array([lengths[i][0] - lengths[i][1] for i in kept], np.float64)
    hard = None if gamed is None else _difficulties(gamed, kept if instructions is None else [instructions[i] for i in kept])
    # 1. the model
    x, weight, target = _rows(y, delta, hard, gamed)
    chosen = gamed is not None if cross_validated is None else cross_validated
    strength = _chosen(x, target, weight) if chosen else WEAK
    weights = fit_glm(x, target, weight, strength)
    rate = _rate(weights, hard, len(y))
    # 2. its interval: instructions drawn with replacement
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if len(y) > 1 else 0):
        some = rng.integers(len(y), size=len(y))
        own = None if hard is None else hard[some]
        rows, w, t = _rows(y[some], delta[some], own, gamed)
        drawn.append(_rate(fit_glm(rows, t, w, max(strength, WEAK), weights), own, len(y)))
    low, high = map(float, np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])) if drawn else (None, None)
    names = ("length", "model") if hard is None else ("length", "difficulty", "model")
    return LengthControlled(
        Interval(rate, low, high, len(y), len(preference) - len(y)), dict(zip(names, map(float, weights), strict=True)),
        strength, gamed is not None,
    )  # fmt: skip


def _difficulties(gamed: Gamed, numbers: Sequence[int]) -> Floats:
    missing = [number for number in numbers if number not in gamed.difficulty]
    if missing:
        raise InputError(
            f"the difficulty of instruction {missing[0]} is not known; give AlpacaEval's own instructions, in its order"
        )
    return np.array([gamed.difficulty[number] for number in numbers], np.float64)


def _rows(y: Floats, delta: Floats, hard: Floats | None, gamed: Gamed | None) -> tuple[Floats, Floats, Floats]:
    """Features `[n, terms]`, weights `[n]` and preferences `[n]` of all comparisons that take part."""
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    length = np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)
    if hard is None or gamed is None:
        return np.stack([length, np.ones_like(length)], axis=1), np.ones_like(y), y
    own = np.stack([length, hard, np.ones_like(length)], axis=1)
    x = np.concatenate([gamed.features, own])
    return x, np.where(x[:, 2] == 1, 1.0, GAMED_WEIGHT), np.concatenate([gamed.preference, y])


def _rate(weights: Floats, hard: Floats | None, n: int) -> float:
    """Mean predicted preference in percent, the length term at 0."""
    on = np.full(n, weights[-1]) if hard is None else weights[-1] + weights[1] * hard
    return 100 * float(_sigmoid(on).mean())


# ------------------------------------------------------------------------------------------------ the logistic model


def fit_glm(x: Floats, y: Floats, weight: Floats, strength: float, start: Floats | None = None) -> Floats:
    """Weights `[terms]` that minimise sum |w| + strength * sum of weighted log losses of preferences y `[n]`, 0 to 1.

    Args:
        start: weights that are near, if some are known.
    """
    from scipy.optimize import minimize

    terms = x.shape[1]

    def objective(halves: Floats) -> tuple[float, Floats]:
        # w = up - down, both at least 0: the penalty is smooth there
        w = halves[:terms] - halves[terms:]
        z = x @ w
        loss = weight @ (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
        slope = x.T @ (weight * (_sigmoid(z) - y))
        scale = 1 / (1 + strength * weight.sum())
        return scale * (halves.sum() + strength * loss), scale * (1 + strength * np.concatenate([slope, -slope]))

    near = np.zeros(terms) if start is None else start
    begin = np.maximum(np.concatenate([near, -near]), 0)
    found = minimize(
        objective, begin, jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * terms),
        options={"ftol": 1e-13, "gtol": 1e-10, "maxiter": 5000},
    )  # fmt: skip
    w: Floats = found.x[:terms] - found.x[terms:]
    return w


def _chosen(x: Floats, y: Floats, weight: Floats) -> float:
    """The strength under which held-out comparisons are predicted best; a weak penalty if there are too few to hold out."""
    from sklearn.model_selection import GroupKFold

    if len(y) < FOLDS:
        return WEAK
    rows = np.arange(len(y))
    folds = list(GroupKFold(FOLDS).split(np.concatenate([rows, rows]), groups=np.concatenate([rows, rows])))
    scores = np.zeros((FOLDS, len(STRENGTHS)))
    for i, (train, test) in enumerate(folds):
        inside, outside = np.unique(train % len(y)), np.unique(test % len(y))
        for j, strength in enumerate(STRENGTHS):
            p = np.clip(_sigmoid(x[outside] @ fit_glm(x[inside], y[inside], weight[inside], strength)), 1e-15, 1 - 1e-15)
            scores[i, j] = np.mean(weight[outside] * (y[outside] * np.log(p) + (1 - y[outside]) * np.log(1 - p)))
    return STRENGTHS[int(scores.mean(axis=0).argmax())]


def _sigmoid(z: Floats) -> Floats:
    out: Floats = np.exp(-np.logaddexp(0, -z))
    return out
