"""Probes: one direction of the residual stream per layer, and what is known about it.

From answer-averaged embeddings of both poles of a trait, `fit_probe` takes the direction v (logistic regression, or
the difference of the class means), or is given one, and finds the boundary m and the statistics that rules need. A probe
cannot come out without its evidence: how well the direction reads answers that it was not fitted on. A direction that does not is
refused (`WeakProbe`), because logistic regression separates pure noise perfectly when d exceeds n.

This module knows numbers, not models: embeddings in, probes out. numpy and scikit-learn only.

Source: arXiv 2604.08169, section 3: C = 1.0, L-BFGS, no standardisation, v = w/|w|, m = -b/|w|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from steerguard.errors import ContrastError, WeakProbe

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Direction = Literal["logistic", "mean-difference"]
"""How a direction is learnt. Where one is given instead, as a vector, only its sign and its boundary are learnt."""
Progress = Callable[[int, int], None]
"""Called with (done, total) as long work goes on."""

C = 1.0
"""Inverse regularisation of the logistic regression."""
FOLDS = 5
MIN_PAIRS = 8
"""Fewer scenarios than this cannot be cross-validated to any use."""
WEAK_AUROC = 0.6
"""A probe is weak if the lower end of its held-out AUROC's 95 % interval does not exceed this. On shuffled labels with
100 answers that happens about once in ten thousand layers."""


@dataclass(frozen=True)
class Evidence:
    """How well a direction reads answers that it was not fitted on."""

    auroc: float
    "area under the ROC curve of out-of-fold projections; folds share no scenario"
    auroc_low: float
    auroc_high: float
    """95 % interval of auroc, bootstrap over scenarios; the lower end is held to what so many independent pairs can show"""
    cohens_d: float
    "(mu_pos - mu_neg) / pooled standard deviation of the out-of-fold projections"
    split_half: float
    """mean cosine of the directions fitted on random disjoint halves of the scenarios; of a given direction only the sign is
    fitted, so this is 1 where the halves agree on it"""
    cosine_mean_difference: float
    "cosine of v with mean(positive) - mean(negative)"
    n_pos: int
    n_neg: int
    "answers in each class"

    @property
    def weak(self) -> bool:
        return not self.auroc_low > WEAK_AUROC

    def __str__(self) -> str:
        return (
            f"AUROC {self.auroc:.3f} [{self.auroc_low:.3f}, {self.auroc_high:.3f}] held out, d {self.cohens_d:.2f}, "
            f"split-half cosine {self.split_half:.2f}, n {self.n_pos}+{self.n_neg}"
        )


@dataclass(frozen=True, eq=False)
class Probe:
    """What one layer knows of a trait. All scalars are projections, in units of the residual stream."""

    layer: int
    "index of the decoder block whose output this reads, 0 the first"
    v: Floats
    "[d] unit vector, float32, pointing to the positive (aligned) pole"
    m: float
    """decision boundary of the logistic regression along v; halfway between the means for a mean difference; of a given
    direction, the boundary of a logistic regression on the projections alone"""
    mu_pos: float
    sigma_pos: float
    mu_neg: float
    sigma_neg: float
    "mean and (population) standard deviation of the answer-averaged projections of each class"
    evidence: Evidence

    def __post_init__(self) -> None:
        v = np.array(self.v, dtype=np.float32)  # a copy: it is made read-only below
        scalars = (self.m, self.mu_pos, self.sigma_pos, self.mu_neg, self.sigma_neg)
        if v.ndim != 1 or not np.isfinite(v).all() or not all(map(math.isfinite, scalars)):
            raise ContrastError(f"probe of layer {self.layer}: v must be a finite vector and its statistics finite")
        if abs(float(np.linalg.norm(v.astype(np.float64))) - 1) > 1e-4:
            raise ContrastError(f"probe of layer {self.layer}: |v| is {np.linalg.norm(v):.6f}, must be 1")
        if self.layer < 0 or self.sigma_pos < 0 or self.sigma_neg < 0:
            raise ContrastError(f"probe of layer {self.layer}: layer and standard deviations must not be negative")
        v.setflags(write=False)
        object.__setattr__(self, "v", v)

    @property
    def delta_mu(self) -> float:
        "mu_pos - mu_neg: one class separation"
        return self.mu_pos - self.mu_neg

    def project(self, h: npt.ArrayLike) -> Floats:
        """rho `[...]` of residuals `[..., d]`, float32."""
        return np.asarray(h, dtype=np.float32) @ self.v

    def __repr__(self) -> str:
        weak = ", WEAK" if self.evidence.weak else ""
        return (
            f"Probe(layer {self.layer}, d {len(self.v)}, m {self.m:.3f}, mu_pos {self.mu_pos:.3f}, "
            f"mu_neg {self.mu_neg:.3f}; {self.evidence}{weak})"
        )


@dataclass(frozen=True, repr=False)
class Probes(Mapping[int, Probe]):
    """One probe per layer, by layer."""

    by_layer: Mapping[int, Probe]

    def __getitem__(self, layer: int) -> Probe:
        try:
            return self.by_layer[layer]
        except KeyError:
            raise ContrastError(f"there is no probe of layer {layer}; there are {ranges(list(self.by_layer))}") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    @property
    def best_read(self) -> Probe:
        """The probe with the highest held-out AUROC (Cohen's d among equals). Never a choice of where to steer."""
        return max(self.by_layer.values(), key=lambda p: (p.evidence.auroc, p.evidence.cohens_d))

    def __repr__(self) -> str:
        return f"Probes(layers {ranges(list(self.by_layer))}; best read: {self.best_read!r})"


# ------------------------------------------------------------------------------------------------ fitting


def fit_probes(
    pos: Floats,
    neg: Floats,
    *,
    layers: Sequence[int],
    scenarios: Sequence[str],
    direction: Direction | Mapping[int, Floats] = "logistic",
    seed: int = 42,
    allow_weak: bool = False,
    progress: Progress | None = None,
) -> Probes:
    """One probe per layer from the answer-averaged embeddings of both poles.

    Args:
        pos, neg: `[n, layers, d]` float32, answers under the positive and the negative pole; row i of both belongs to
            `scenarios[i]`, and rows of one scenario never stand on two sides of a fold.
        layers: the decoder blocks that the second axis stands for.
        direction: `logistic` (the paper's) or `mean-difference`; or a given direction per layer, `[d]` unit vectors, of
            which only the sign and the boundary are fitted.
        allow_weak: return probes that read nothing held out, instead of raising.

    Raises:
        ContrastError: fewer than `MIN_PAIRS` scenarios, or activations that are not finite.
        WeakProbe: no layer reads held-out answers.
    """
    if isinstance(direction, str) and direction not in get_args(Direction):
        raise ContrastError(f"there is no direction {direction!r}; there are {', '.join(get_args(Direction))}")
    if pos.shape != neg.shape or pos.ndim != 3 or pos.shape[:2] != (len(scenarios), len(layers)):
        raise ContrastError(
            f"embeddings must be [{len(scenarios)} answers, {len(layers)} layers, d] for both poles, "
            f"got {pos.shape} and {neg.shape}"
        )
    groups = np.unique(np.asarray(scenarios), return_inverse=True)[1].astype(np.int64)
    n_groups = int(groups.max(initial=-1)) + 1
    if n_groups < MIN_PAIRS:
        raise ContrastError(f"{n_groups} scenarios have answers under both poles; a probe needs at least {MIN_PAIRS}")
    for name, x in (("positive", pos), ("negative", neg)):
        bad = [layer for i, layer in enumerate(layers) if not np.isfinite(x[:, i]).all()]
        if bad:
            raise ContrastError(
                f"activations of the {name} answers are not finite at layers {ranges(bad)}; "
                "load the model in a wider dtype (bfloat16 or float32) and fit again"
            )
    probes: dict[int, Probe] = {}
    for i, layer in enumerate(layers):
        how = direction if isinstance(direction, str) else _given(direction, layer, pos.shape[2])
        probes[layer] = fit_probe(pos[:, i], neg[:, i], layer=layer, groups=groups, direction=how, seed=seed)
        if progress is not None:
            progress(i + 1, len(layers))
    found = Probes(probes)
    if not allow_weak and all(p.evidence.weak for p in probes.values()):
        best = found.best_read
        raise WeakProbe(
            f"no layer tells the two poles apart on held-out answers: the best is layer {best.layer} with {best.evidence}; "
            f"the lower end must exceed {WEAK_AUROC}. Read the answers (do the system prompts take effect?), add "
            "scenarios, or pass allow_weak=True to look at the probes all the same"
        )
    return found


def fit_probe(
    pos: Floats, neg: Floats, *, layer: int, groups: Ints, direction: Direction | Floats = "logistic", seed: int = 42
) -> Probe:
    """The probe of one layer from `[n, d]` embeddings of each pole; `groups[i]` is the scenario of row i of both.

    A `direction` that is given as a unit vector `[d]` is turned round if it points to the negative pole.
    """
    x = np.concatenate([pos, neg]).astype(np.float64)
    y = np.repeat([1, 0], [len(pos), len(neg)])
    group = np.concatenate([groups, groups])
    # 1. the direction and its boundary, on all answers
    w, m = _direction(x, y, direction)
    v = w.astype(np.float32)
    rho = x @ v.astype(np.float64)
    # 2. the statistics that rules need
    on_pos, on_neg = rho[y == 1], rho[y == 0]
    # 3. the evidence, on answers that the direction was not fitted on
    evidence = _evidence(x, y, group, v, direction, np.random.default_rng([seed, layer]))
    return Probe(
        layer=layer, v=v, m=float(m),
        mu_pos=float(on_pos.mean()), sigma_pos=float(on_pos.std()),
        mu_neg=float(on_neg.mean()), sigma_neg=float(on_neg.std()),
        evidence=evidence,
    )  # fmt: skip


def refit_statistics(probe: Probe, pos: Floats, neg: Floats) -> Probe:
    """The same direction and boundary with mu and sigma of other answers: `[n, d]` each."""
    on_pos, on_neg = probe.project(pos), probe.project(neg)
    return replace(
        probe,
        mu_pos=float(on_pos.mean()), sigma_pos=float(on_pos.std()),
        mu_neg=float(on_neg.mean()), sigma_neg=float(on_neg.std()),
    )  # fmt: skip


def _given(directions: Mapping[int, Floats], layer: int, width: int) -> Floats:
    """The direction that is given for this layer, if it is one."""
    v = np.asarray(directions[layer], dtype=np.float32) if layer in directions else np.empty(0, dtype=np.float32)
    if v.shape != (width,) or not abs(float(np.linalg.norm(v.astype(np.float64))) - 1) <= 1e-4:
        got = f"shape {v.shape} and norm {np.linalg.norm(v):.4g}" if layer in directions else "none"
        raise ContrastError(f"the direction of layer {layer} must be a unit vector of width {width}, got {got}")
    return v


def _direction(x: Doubles, y: npt.NDArray[np.int_], kind: Direction | Floats) -> tuple[Doubles, float]:
    """The unit vector and the boundary along it, from embeddings `[n, d]` and labels `[n]`."""
    if not isinstance(kind, str):
        v = kind.astype(np.float64)
        sign, m = _boundary(x @ v, y)
        return sign * v, sign * m
    if kind == "mean-difference":
        mean_pos, mean_neg = x[y == 1].mean(0), x[y == 0].mean(0)
        w = mean_pos - mean_neg
        norm = float(np.linalg.norm(w))
        if norm == 0:
            raise ContrastError("the two poles have the same mean embedding: their answers do not differ")
        return w / norm, float((mean_pos + mean_neg) / 2 @ w / norm)
    from sklearn.linear_model import LogisticRegression  # heavy: loaded when a probe is fitted, not on import

    # The embeddings are centred first: the intercept is not regularised, so the solution is the same and L-BFGS,
    # which starts at zero, gets there in far fewer steps.
    centre = x.mean(0)
    fit = LogisticRegression(C=C, solver="lbfgs", max_iter=10_000).fit(x - centre, y)
    w = fit.coef_[0]
    norm = float(np.linalg.norm(w))
    if norm == 0:
        raise ContrastError("logistic regression found no direction: the two poles' answers do not differ")
    return w / norm, float(-fit.intercept_[0] / norm + centre @ w / norm)


def _boundary(rho: Doubles, y: npt.NDArray[np.int_]) -> tuple[float, float]:
    """The side of the positive class (1 or -1) and the boundary, by a logistic regression on projections `[n]` alone.

    The objective is that of the paper's regression, C = 1.0 on the projections as they are. Two numbers are sought, so Newton's
    method finds them to the last digit; scikit-learn's solvers stop at an absolute tolerance, which small residuals are below.
    """
    centre, spread = float(rho.mean()), float(rho.std())
    if not spread > 0:
        raise ContrastError("all answers have the same projection on the given direction: it tells nothing apart")
    x = (rho - centre) / spread
    design = np.stack([x, np.ones_like(x)], axis=1)
    penalty = np.array([1 / (C * spread**2), 0.0])  # of w in units of the spread; the intercept is free, as in the paper's

    def loss(at: Doubles) -> float:
        z = design @ at
        return float((np.logaddexp(0, z) - y * z).sum() + (penalty * at**2).sum() / 2)

    at = np.zeros(2)
    for _ in range(100):
        p = (1 + np.tanh(design @ at / 2)) / 2
        gradient = design.T @ (p - y) + penalty * at
        step = -np.linalg.solve((design.T * (p * (1 - p))) @ design + np.diag(penalty), gradient)
        promise, size = float(-gradient @ step), 1.0
        while promise > 1e-6 and loss(at + size * step) > loss(at) - size * promise / 4:
            size /= 2
        at = at + size * step
        if promise < 1e-20:
            break
    if at[0] == 0:
        raise ContrastError("the two poles have the same mean projection on the given direction: it tells nothing apart")
    return math.copysign(1.0, at[0]), centre - float(at[1] / at[0]) * spread


def _evidence(
    x: Doubles, y: npt.NDArray[np.int_], group: Ints, v: Floats, kind: Direction | Floats, rng: np.random.Generator
) -> Evidence:
    from sklearn.metrics import roc_auc_score

    n_groups = int(group.max()) + 1
    # 1. out-of-fold projections, centred by each fold's own boundary so that folds can be pooled
    fold_of = rng.permutation(n_groups) % FOLDS
    held_out = np.empty(len(y))
    for fold in range(FOLDS):
        out = fold_of[group] == fold
        w, boundary = _direction(x[~out], y[~out], kind)
        held_out[out] = x[out] @ w - boundary
    auroc = float(roc_auc_score(y, held_out))
    # 2. its interval: resample scenarios, not answers
    rows = [np.nonzero(group == g)[0] for g in range(n_groups)]
    boots = []
    for _ in range(400):
        drawn = np.concatenate([rows[g] for g in rng.integers(n_groups, size=n_groups)])
        boots.append(_auroc(held_out[drawn], y[drawn]))
    low, high = np.quantile(boots, [0.025, 0.975])
    # A bootstrap of few scenarios is too narrow, and one of perfect separation has no width at all: the lower end is no
    # higher than the normal interval of as many independent pairs gives, nor than what the rule of three allows.
    low = min(float(low), auroc - 1.96 * _standard_error(auroc, n_groups), 1 - 3 / len(y))
    # 3. effect size, stability, agreement with the mean difference
    pos, neg = held_out[y == 1], held_out[y == 0]
    pooled = math.sqrt((pos.var(ddof=1) + neg.var(ddof=1)) / 2)
    mean_difference = _direction(x, y, "mean-difference")[0]
    return Evidence(
        auroc=auroc, auroc_low=max(low, 0.0), auroc_high=float(high),
        cohens_d=float((pos.mean() - neg.mean()) / pooled) if pooled > 0 else 0.0,
        split_half=_split_half(x, y, group, kind, rng),
        cosine_mean_difference=float(v.astype(np.float64) @ mean_difference),
        n_pos=int((y == 1).sum()), n_neg=int((y == 0).sum()),
    )  # fmt: skip


def _auroc(score: Doubles, y: npt.NDArray[np.int_]) -> float:
    """Area under the ROC curve by ranks; ties count half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n_pos = int(y.sum())
    n_neg = len(y) - n_pos
    return float((rank[y == 1].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def _standard_error(auroc: float, n: int) -> float:
    """Of the AUROC of n independent pairs. Source: Hanley and McNeil, 1982."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    return math.sqrt((auroc * (1 - auroc) + (n - 1) * (q1 + q2 - 2 * auroc**2)) / n**2)


def _split_half(
    x: Doubles, y: npt.NDArray[np.int_], group: Ints, kind: Direction | Floats, rng: np.random.Generator, repeats: int = 3
) -> float:
    cosines = []
    for _ in range(repeats):
        half = (rng.permutation(int(group.max()) + 1) % 2).astype(bool)[group]
        cosines.append(float(_direction(x[half], y[half], kind)[0] @ _direction(x[~half], y[~half], kind)[0]))
    return float(np.mean(cosines))


def ranges(numbers: Sequence[int]) -> str:
    """'0-3, 7' for [0, 1, 2, 3, 7]."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in out) or "none"
