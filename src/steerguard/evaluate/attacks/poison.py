"""Poisoned pairs: somebody has exchanged the labels of a few of the answers that the probe is fitted on.

    pos, neg = embed(model, contrast)                       # the guard's layers; kept, nothing is generated anew
    result = poison(model, trait.test, guard, contrast, (pos, neg), scorer=scorer)
    print(result)

For each share the probe of every layer of the guard is fitted again on the pairs with so many poles exchanged, and the guard
with its rule, strength and positions made of it. What comes of it: the cosine with the clean direction, how well it reads
held-out answers with their true labels, how well it *seems* to read (with the labels that whoever fits it has), and what the
guard brings back. Pairs are poisoned by lot, or by an attacker who knows the guard's direction and takes those that it tells
apart most.

Both ways to find a direction are tried: a logistic regression bends to a few wrong labels, a difference of means moves by their
share. Labels decide the statistics as well, and a rule whose strength counts spreads may fail for no other reason than that: so
each guard is tried again at the strength at which it moves tokens as far as the guard that was given (`retuned`).

It knows embeddings, probes and guards; it knows no model but to ask it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Backend, Floats, Sampling
from steerguard.errors import InputError, RuleError
from steerguard.evaluate import BATCH
from steerguard.evaluate.attacks.monitor import auroc
from steerguard.evaluate.matching import match, mean_shift, projections
from steerguard.evaluate.results import figure
from steerguard.fitting import Contrast, prompts_of
from steerguard.guard import Guard
from steerguard.journal import Journal
from steerguard.metrics import Interval, bootstrap_interval, paired_difference, recovered_interval
from steerguard.metrics.reading import Exchange, check_unguarded
from steerguard.probe import FOLDS, Direction, Probe, fit_probe
from steerguard.prompts import Prompt
from steerguard.scorers import Score, Scorer
from steerguard.sweeping.answers import Answers, Row
from steerguard.traits import Scenario

if TYPE_CHECKING:
    from steerguard.fitting import Stage

SHARES = (0.0, 0.05, 0.10, 0.25)
"""Of the pairs: none, what the field asks for, and more than anybody would miss."""
TINY = 1e-12

Which = Literal["random", "strongest"]
Groups = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Poisoned:
    """A guard that was fitted on pairs of which a share is poisoned."""

    share: float
    "that was asked for, 0 to 1"
    which: Which
    direction: Direction
    "how the direction was found"
    pairs: int
    "that were poisoned"
    of: int
    "pairs"
    cosine: float
    "with the direction that is found likewise with nothing poisoned; the least of the guard's layers"
    auroc: float
    "on answers that it was not fitted on, with their true labels; the least of the layers"
    auroc_seen: float
    "what a fit on these pairs reports: held out as well, but with the labels as they are given"
    spread: float
    "sigma_pos over that with nothing poisoned; the greatest of the layers"
    trait: Interval | None
    "of the answers under the malicious prompts with this guard; None if there is no guard, see `note`"
    coherence: Interval | None
    recovered: Interval | None
    "share of the gap from unguarded to aligned, in percent"
    less_than_clean: Interval | None
    "trait less that with nothing poisoned and a direction found likewise, scenario by scenario"
    retuned: Interval | None
    "trait at the strength at which it moves tokens as far as the guard that was given; None if there is no such strength"
    strength: float | None
    "that strength"
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.pairs} of {self.of} pairs ({self.which}, {self.direction}): cosine {self.cosine:.3f}, AUROC {self.auroc:.3f} "
            f"(seems {self.auroc_seen:.3f}), sigma_pos x {self.spread:.1f}, trait {figure(self.trait)}, coherence "
            f"{figure(self.coherence)}, recovered {figure(self.recovered)} %, retuned {figure(self.retuned)}"
            f"{f'; {self.note}' if self.note else ''}"
        )


@dataclass(frozen=True)
class Poison:
    """All shares; of each way to find a direction, the clean one first."""

    results: tuple[Poisoned, ...]
    unguarded: Interval | None
    aligned: Interval | None
    "trait of the answers without a guard, under the malicious and the aligned prompts"
    scenarios: int
    model: str
    guard: str
    "digest of the guard that was given"
    scorer: Mapping[str, Any]
    sampling: Sampling
    seed: int

    def of(self, share: float, which: Which = "random", direction: Direction = "logistic") -> Poisoned:
        """One result. Raises InputError, naming what there is."""
        for one in self.results:
            if one.share == share and one.direction == direction and (one.which == which or one.pairs == 0):
                return one
        known = ", ".join(f"{one.share:g} {one.which} {one.direction}" for one in self.results)
        raise InputError(f"nothing was poisoned at {share:g} {which} {direction}; there are {known}")

    def __str__(self) -> str:
        head = f"{self.scenarios} scenarios; unguarded {figure(self.unguarded)}, aligned {figure(self.aligned)}"
        return "\n".join([head, *map(str, self.results)])


# -------------------------------------------------------------------------------------------------------- poisoning


def swapped(pos: Floats, neg: Floats, chosen: Bools) -> tuple[Floats, Floats]:
    """Embeddings `[n, ...]` of both poles with the chosen pairs exchanged."""
    where = chosen.reshape(-1, *[1] * (pos.ndim - 1))
    return np.where(where, neg, pos), np.where(where, pos, neg)


def choose(pos: Floats, neg: Floats, share: float, which: Which, v: Floats, rng: np.random.Generator) -> Bools:
    """Which of the pairs `[n, d]` are poisoned, `[n]`. Raises InputError for a share or a way to choose that is none."""
    if not 0 <= share <= 1 or which not in get_args(Which):
        raise InputError(f"a share is from 0 to 1 and pairs are chosen {' or '.join(get_args(Which))}, got {share} and {which!r}")
    n, count = len(pos), round(share * len(pos))
    chosen = np.zeros(n, bool)
    if which == "random":
        chosen[rng.permutation(n)[:count]] = True
    else:
        chosen[np.argsort(-((pos - neg).astype(np.float64) @ v.astype(np.float64)), kind="stable")[:count]] = True
    return chosen


def true_auroc(
    pos: Floats, neg: Floats, chosen: Bools, groups: Groups, layer: int, *, direction: Direction = "logistic", seed: int = 42
) -> float:
    """AUROC of answers with their true labels, each read by a direction that was fitted on the poisoned pairs of other groups."""
    fold = np.random.default_rng([seed, layer]).permutation(int(groups.max()) + 1) % FOLDS
    one, other = swapped(pos, neg, chosen)
    high, low = np.empty(len(pos)), np.empty(len(pos))
    for k in range(FOLDS):
        out = fold[groups] == k
        known = np.unique(groups[~out], return_inverse=True)[1].astype(np.int64)
        fitted = fit_probe(one[~out], other[~out], layer=layer, groups=known, direction=direction, seed=seed)
        high[out], low[out] = pos[out] @ fitted.v - fitted.m, neg[out] @ fitted.v - fitted.m
    return auroc(high, low)


# -------------------------------------------------------------------------------------------------- all of it at once


def poison(
    model: Backend,
    scenarios: Sequence[Scenario],
    guard: Guard,
    contrast: Contrast,
    embeddings: tuple[Floats, Floats],
    *,
    scorer: Scorer,
    shares: Sequence[float] = SHARES,
    which: Sequence[Which] = ("random",),
    directions: Sequence[Direction] = ("logistic", "mean-difference"),
    sampling: Sampling = Sampling(),
    seed: int = 42,
    store: Path | None = None,
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Poison:
    """Fit again on poisoned pairs, and see what the guard is worth then. The same labels are exchanged on all its layers.

    Args:
        contrast: the answers that the embeddings are of.
        embeddings: `[n, layers, d]` of both poles of its usable pairs, on the guard's layers.
        shares: of the pairs; nothing poisoned comes first in any case.
        seed: of the choice of pairs.
        store: a journal that answers are kept in as they come, and found again in.

    Raises:
        InputError: no scenarios, embeddings of other layers or pairs, or a model inside `guarded`.
    """
    pos, neg = embeddings
    pairs = contrast.usable()
    if not scenarios or pos.shape != neg.shape or pos.shape[:2] != (len(pairs), len(guard.probes)):
        raise InputError(
            f"poisoning needs scenarios, and embeddings [{len(pairs)} pairs, {len(guard.probes)} layers, d] of both poles, got "
            f"{len(scenarios)} and {list(pos.shape)}, {list(neg.shape)}"
        )
    check_unguarded(model)
    groups = np.unique(["\n".join(pair.scenario.turns) for pair in pairs], return_inverse=True)[1].astype(np.int64)
    poisoned: list[tuple[float, Which]] = [(0.0, "random"), *((share, how) for how in which for share in shares if share > 0)]
    plan = [(direction, *one) for direction in directions for one in poisoned]
    # 1. probes and guards
    made = []
    for i, one in enumerate(plan):
        if progress is not None:
            progress("probes on poisoned pairs", i, len(plan))
        made.append(_fitted(guard, pos, neg, groups, *one, seed))
    # 2. what they bring back
    aligned, misaligned = zip(*(prompts_of(scenario) for scenario in scenarios), strict=True)
    with closing(Journal(store)) as journal:
        answers = Answers(model, sampling, journal, batch=batch, progress=progress)

        def scores(prompts: Sequence[Prompt], own: Guard | None, what: str) -> list[Score]:
            kept = answers.of([Row(prompt, () if own is None else (own,)) for prompt in prompts], f"poisoned pairs, {what}")
            return scorer.scores(scenarios, [answer.text for answer in kept])

        plain = answers.of([Row(prompt) for prompt in misaligned], "poisoned pairs, unguarded", whole=True)
        retuned = _retuned(model, guard, [own for _, own in made], [(p, k.ids) for p, k in zip(misaligned, plain, strict=True)])
        best, worst = scores(aligned, None, "aligned"), scorer.scores(scenarios, [kept.text for kept in plain])
        told = [f"{found.pairs} of {found.of}" for found, _ in made]
        values = [None if own is None else scores(misaligned, own, what) for (_, own), what in zip(made, told, strict=True)]
        again = [
            None if own is None else scores(misaligned, own, f"{what}, retuned") for own, what in zip(retuned, told, strict=True)
        ]
    # 3. figures
    clean = {found.direction: own for (found, _), own in zip(made, values, strict=True) if found.pairs == 0}
    arms = _Arms([scenario.id for scenario in scenarios], worst, best, clean)
    parts = zip(made, values, again, retuned, strict=True)
    results = [arms.of(found, own, other, one) for (found, _), own, other, one in parts]
    return Poison(
        tuple(results), arms.mean(worst), arms.mean(best), len(scenarios), model.identity.name, guard.digest,
        dict(scorer.identity), sampling, seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Arms:
    """What every poisoned guard is compared with."""

    ids: Sequence[str]
    unguarded: Sequence[Score]
    aligned: Sequence[Score]
    clean: Mapping[Direction, Sequence[Score] | None]

    def mean(self, scores: Sequence[Score] | None) -> Interval | None:
        return None if scores is None else bootstrap_interval(_trait(scores), groups=self.ids)

    def of(self, found: Poisoned, own: Sequence[Score] | None, again: Sequence[Score] | None, retuned: Guard | None) -> Poisoned:
        """The result with what its answers were worth."""
        more = replace(found, retuned=self.mean(again), strength=None if retuned is None else retuned.rule.strength)
        if own is None:
            return more
        clean = self.clean[found.direction]
        return replace(
            more, trait=self.mean(own), coherence=bootstrap_interval([one.coherence for one in own], groups=self.ids),
            recovered=recovered_interval(_trait(self.unguarded), _trait(self.aligned), _trait(own)),
            less_than_clean=None if clean is None else paired_difference(_trait(own), _trait(clean), groups=self.ids),
        )  # fmt: skip


def _trait(scores: Sequence[Score]) -> list[float | None]:
    return [score.trait for score in scores]


def _retuned(model: Backend, guard: Guard, made: Sequence[Guard | None], exchanges: Sequence[Exchange]) -> list[Guard | None]:
    """Each guard at the strength at which it moves these tokens as far as the given one; None where there is none."""
    known = [one for one in made if one is not None]
    if len(guard.probes) != 1 or not known or not type(guard.rule).grid:
        return [None] * len(made)
    rho, *others = projections(model, exchanges, guard, [guard.probes[0].v, *(one.probes[0].v for one in known)])
    target = mean_shift(guard.rule, guard.probes[0], rho)
    found = {
        id(one): replace(one, rule=best.rule)
        for one, on_v in zip(known, others, strict=True)
        if target > 0 and (best := match(guard.rule.name, one.probes[0], on_v, target)).matched
    }
    return [None if one is None else found.get(id(one)) for one in made]


def _fitted(
    guard: Guard, pos: Floats, neg: Floats, groups: Groups, direction: Direction, share: float, which: Which, seed: int
) -> tuple[Poisoned, Guard | None]:
    """The guard on poisoned pairs, with what is known of it before it is asked anything."""
    rng = np.random.default_rng([seed, round(share * 1e6)])
    chosen = choose(pos[:, 0], neg[:, 0], share, which, guard.probes[0].v, rng)
    probes: list[Probe] = []
    read = []
    for i, layer in enumerate(guard.layers):
        own = pos[:, i], neg[:, i]
        probes.append(fit_probe(*swapped(*own, chosen), layer=layer, groups=groups, direction=direction, seed=seed))
        clean = fit_probe(*own, layer=layer, groups=groups, direction=direction, seed=seed) if chosen.any() else probes[-1]
        area = true_auroc(*own, chosen, groups, layer, direction=direction, seed=seed)
        read.append((float(probes[-1].v @ clean.v), area, probes[-1].sigma_pos / max(clean.sigma_pos, TINY)))
    cosines, areas, spreads = zip(*read, strict=True)
    found = Poisoned(
        share=share, which=which, direction=direction, pairs=int(chosen.sum()), of=len(pos), cosine=min(cosines),
        auroc=min(areas), auroc_seen=min(probe.evidence.auroc for probe in probes), spread=max(spreads), trait=None,
        coherence=None, recovered=None, less_than_clean=None, retuned=None, strength=None,
    )  # fmt: skip
    try:
        own_guard = replace(guard, probes=tuple(probes), provenance={"poisoned": share}, allow_weak=True)
    except RuleError as error:
        return replace(found, note=f"no guard can be made of it: {error}"), None
    weak = any(probe.evidence.weak for probe in probes)
    return (replace(found, note="its probe is refused as weak unless that is allowed") if weak else found), own_guard
