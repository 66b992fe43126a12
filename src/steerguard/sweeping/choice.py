"""The choice: of the settings that were scored, each rule's operating point, and how sure it is.

Eligible is what keeps enough of the aligned coherence and, where benign prompts are given, does little to them. The
choice is the gentlest eligible setting whose trait cannot be told from the best: a few dozen scenarios cannot tell
neighbours apart, and the highest of many noisy figures is mostly the luckiest.

It knows figures. It knows no model: what settings cost on benign prompts is asked of whoever calls.

Source: arXiv 2604.08169, section 4 (which has the coherence bar; the bars on benign prompts and the rule of one
standard error are ours).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerguard.sweeping.points import Figures, Scored, Setting

RESAMPLES = 1000


@dataclass(frozen=True)
class Limits:
    """What a setting must keep to be eligible; None: not asked for."""

    coherence_kept: float = 0.9
    "share of the aligned baseline's coherence (the paper's)"
    kl: float | None = 0.1
    "nats per token to the unguarded model, on benign prompts"
    fire_rate: float | None = 0.25
    "share of the tokens of benign prompts that a gate may move; rules that have no gate move them all, and are held to KL"
    benign_lost: float | None = 1.0
    """points of 100 on benign prompts whose answers can be scored. Half of the 2 points that we hold a guard to when it is
    reported: of a few dozen prompts, not one answer may be lost"""

    def broken(self, cost: Cost) -> list[str]:
        """Which bars a setting does not keep, in words."""
        bars = (
            ("KL on benign prompts", cost.kl, self.kl, "{:.3f}"),
            ("fire rate on benign prompts", cost.fire_rate if cost.gated else None, self.fire_rate, "{:.2f}"),
            ("points lost on benign prompts", cost.lost, self.benign_lost, "{:.1f}"),
        )
        return [
            f"{what} {form.format(value)}, the bar is {bar:g}"
            for what, value, bar, form in bars
            if value is not None and bar is not None and value > bar
        ]

    def __str__(self) -> str:
        parts = [f"coherence >= {self.coherence_kept:g} of the aligned baseline's"]
        parts += [f"KL <= {self.kl:g} on benign prompts"] if self.kl is not None else []
        parts += [f"fire rate <= {self.fire_rate:g} there (rules with a gate)"] if self.fire_rate is not None else []
        parts += [f"at most {self.benign_lost:g} points lost there"] if self.benign_lost is not None else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Cost:
    """What a setting did to benign prompts; None where it was not measured."""

    gated: bool
    "whether the rule leaves tokens above its knee alone"
    kl: float | None
    "mean nats per token, unguarded || guarded"
    fire_rate: float | None
    "share of the tokens that would be moved"
    lost: float | None
    "points of 100 that answers are worth less than the unguarded ones; negative where the guard helped"
    changed: float | None
    "share of the answers that are not the unguarded ones word for word"
    n: int
    "prompts"


Costs = Callable[[Sequence[Setting]], Mapping[Setting, Cost]]
"""What settings cost on benign prompts."""


@dataclass(frozen=True)
class Choice:
    """What `choose` made of a set of figures."""

    best: Mapping[str, Setting]
    "rule name -> its operating point"
    refused: Mapping[str, str]
    "rule name -> why it has no operating point"
    barred: Mapping[str, Setting]
    "a rule that benign prompts alone refused -> what would have been its operating point without them"
    costs: Mapping[Setting, Cost]
    "what the settings that came into question cost on benign prompts"


@dataclass(frozen=True)
class Sureness:
    """How sure a rule's operating point is."""

    wins: float
    "share of the bootstrap resamples of the scenarios in which this very setting would have been chosen"
    second: Setting | None
    "the setting that was chosen most often otherwise, or is next in rank; None if there is no other"


def choose(
    points: Mapping[Setting, Figures], aligned: Figures, *, limits: Limits = Limits(), costs: Costs | None = None
) -> Choice:
    """Each rule's operating point: of the eligible settings, the `gentlest`.

    Args:
        costs: asked only about settings that would else come into question, since benign prompts cost time.
    """
    refused: dict[str, str] = {}
    eligible: dict[str, dict[Setting, Figures]] = {}
    for name, own in by_rule(points).items():
        eligible[name], why = coherent(own, aligned, limits)
        if not eligible[name]:
            refused[name] = why
    best: dict[str, Setting] = {}
    barred: dict[str, Setting] = {}
    measured: dict[Setting, Cost] = {}
    while waiting := {name: nearly_best(own) for name, own in eligible.items() if own and name not in best}:
        new = [s for near in waiting.values() for s in near if s not in measured]
        if costs is not None and new:
            measured |= costs(new)
        for name, near in waiting.items():
            harmful = [s for s in near if s in measured and limits.broken(measured[s])]
            if not harmful:
                best[name] = gentlest(near, measured)
                continue
            barred.setdefault(name, gentlest(near))
            for setting in harmful:
                del eligible[name][setting]
            if not eligible[name]:
                refused[name] = _why([measured[s] for s in measured if s.rule.name == name], limits)
    return Choice(best, refused, {name: s for name, s in barred.items() if name not in best}, measured)


def _why(costs: Sequence[Cost], limits: Limits) -> str:
    """Why benign prompts refused all of a rule's settings: the bars that bit, at their mildest."""
    mildest = min(costs, key=lambda cost: (len(limits.broken(cost)), cost.kl or 0.0, cost.lost or 0.0))
    broken = "; ".join(limits.broken(mildest))
    return f"none of its {len(costs)} settings with enough coherence is mild enough; the mildest: {broken}"


def by_rule(points: Mapping[Setting, Figures]) -> dict[str, dict[Setting, Figures]]:
    """The points of each rule, in their order."""
    out: dict[str, dict[Setting, Figures]] = {}
    for setting, figures in points.items():
        out.setdefault(setting.rule.name, {})[setting] = figures
    return out


def coherent(own: Mapping[Setting, Figures], aligned: Figures, limits: Limits) -> tuple[dict[Setting, Figures], str]:
    """One rule's settings with enough coherence, and why there are none if there are none."""
    scored = {s: f for s, f in own.items() if f.trait is not None and f.coherence is not None}
    if not scored:
        return {}, f"none of its {len(own)} settings could be scored"
    bar = coherence_bar(aligned, limits)
    top = max(f.coherence or 0.0 for f in scored.values())
    enough = {s: f for s, f in scored.items() if f.coherence is not None and f.coherence >= bar}
    return enough, f"the highest coherence of its {len(own)} settings is {top:.1f}, the bar is {bar:.1f}"


def coherence_bar(aligned: Figures, limits: Limits) -> float:
    """The lowest coherence that is eligible; infinite if the aligned baseline was not scored, which is no licence."""
    return limits.coherence_kept * (math.inf if aligned.coherence is None else aligned.coherence)


def nearly_best(points: Mapping[Setting, Figures]) -> dict[Setting, Figures]:
    """The settings whose trait is within one standard error of the highest."""
    top = max(points.values(), key=rank)
    enough = (top.trait or 0.0) - top.error
    return {s: f for s, f in points.items() if (f.trait or 0.0) >= enough}


def gentlest(near: Mapping[Setting, Figures], costs: Mapping[Setting, Cost] | None = None) -> Setting:
    """Of settings as good as each other, the one that leaves most as it was."""
    return min(near, key=lambda s: _gentleness(s, near[s], (costs or {}).get(s)))


def _gentleness(setting: Setting, figures: Figures, cost: Cost | None) -> tuple[float, float, float, float]:
    """Smaller is gentler: what benign answers and predictions lose, then the mean shift, then the trait.

    Shifts alone mislead between layers, since the residual stream grows from layer to layer.
    """
    changed, kl = (0.0, 0.0) if cost is None else (cost.changed or 0.0, cost.kl or 0.0)
    return changed, kl, figures.shift, -(figures.trait or 0.0)


def rank(figures: Figures) -> tuple[float, float]:
    """Larger is better: the trait, then the smaller shift."""
    return (-math.inf if figures.trait is None else figures.trait, -figures.shift)


def finalists(points: Mapping[Setting, Figures], aligned: Figures, n: int, limits: Limits = Limits()) -> list[Setting]:
    """Each rule's n settings that go on after a look at few scenarios: strong ones and gentle ones of several layers.

    Of each layer the highest trait, best layer first, then the gentlest of each; those with enough coherence come
    first. A few scenarios mislead, so that not all should be of one kind: if one layer's settings harm benign prompts,
    or the strongest do, others must be at hand.
    """
    out: list[Setting] = []
    for own in by_rule(points).values():
        enough, _ = coherent(own, aligned, limits)
        ranked = sorted(own, key=lambda s: (s in enough, *rank(own[s])), reverse=True)
        places = dict.fromkeys((s.layers, s.positions) for s in ranked if s in enough)
        layers = [{t: f for t, f in enough.items() if (t.layers, t.positions) == place} for place in places]
        strongest = [max(of, key=lambda s: rank(own[s])) for of in layers]
        gentle = [gentlest(nearly_best(of)) for of in layers]
        half = (n + 1) // 2
        out += list(dict.fromkeys([*strongest[:half], *gentle[:half], *ranked]))[:n]
    return out


# ---------------------------------------------------------------------------------------------- how sure it is


def sureness(
    points: Mapping[Setting, Scored], aligned: Scored, choice: Choice, *, limits: Limits = Limits(), seed: int = 42
) -> dict[str, Sureness]:
    """How often each rule's operating point would be chosen again if other scenarios of the same kind had been asked.

    The scenarios are drawn with replacement, for all settings and the aligned baseline together, and the choice is made
    anew each time. What benign prompts refused stays refused.
    """
    n = len(aligned.trait)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    out = {}
    for name, best in choice.best.items():
        own = [s for s in points if s.rule.name == name and not limits.broken(choice.costs.get(s, _UNKNOWN))]
        winners = _winners([points[s] for s in own], aligned, drawn, _order(own, points, choice), limits)
        won = Counter(own[i] for i in winners if i >= 0)
        others = [s for s, _ in won.most_common() if s != best]
        others += sorted((s for s in own if s != best), key=lambda s: rank(points[s].figures), reverse=True)
        out[name] = Sureness(won[best] / RESAMPLES, others[0] if others else None)
    return out


_UNKNOWN = Cost(gated=True, kl=None, fire_rate=None, lost=None, changed=None, n=0)


def _order(own: Sequence[Setting], points: Mapping[Setting, Scored], choice: Choice) -> npt.NDArray[np.int_]:
    """`[settings]` each one's place from the gentlest on."""
    gentle = sorted(range(len(own)), key=lambda i: _gentleness(own[i], points[own[i]].figures, choice.costs.get(own[i])))
    places = np.empty(len(own), np.int_)
    places[gentle] = np.arange(len(own))
    return places


def _winners(
    own: Sequence[Scored], aligned: Scored, drawn: npt.NDArray[np.float64], order: npt.NDArray[np.int_], limits: Limits
) -> npt.NDArray[np.int_]:
    """`[resamples]` index of the setting that each resample chooses; -1 for none."""
    trait, error = _means(np.stack([one.trait for one in own]), drawn)
    coherence, _ = _means(np.stack([one.coherence for one in own]), drawn)
    bar, _ = _means(aligned.coherence[None], drawn)
    with np.errstate(invalid="ignore"):
        trait[~(coherence >= limits.coherence_kept * bar)] = -np.inf
    trait[np.isnan(trait)] = -np.inf
    top = trait.argmax(axis=1)
    rows = np.arange(len(trait))
    near = trait >= (trait[rows, top] - error[rows, top])[:, None]
    near &= np.isfinite(trait)
    found = np.where(near, order, len(own)).argmin(axis=1)
    return np.where(near.any(axis=1), found, -1)


def _means(values: npt.NDArray[np.float64], drawn: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Mean and standard error `[resamples, settings]` of values `[settings, scenarios]`, NaN left out."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    count = drawn @ known.T
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = drawn @ filled.T / count
        spread = np.maximum(drawn @ (filled**2).T / count - mean**2, 0) * count / np.maximum(count - 1, 1)
        return mean, np.sqrt(spread / count)
