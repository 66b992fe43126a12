"""Recalibrating: a guard on a new checkpoint of its model, quantised or fine-tuned, say.

What stays is what was searched for: the direction, the rule, its strength, the layers, the positions. What is taken anew are
the numbers that say where the classes stand on that direction (m, mu_pos, sigma_pos, mu_neg, sigma_neg), from the new
checkpoint's own answers to the trait's `train` scenarios, and the evidence that the direction still reads: from its answers
to the `select` scenarios, on which the direction was not fitted. If it does not, there is nothing to recalibrate, and fitting
again is the way. What the sweep measured is not measured again: it stays in the record as what it is, of another checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.drift.reference import BATCH, Reference, with_reference
from steerguard.errors import ContrastError, GuardMismatch, InputError, WeakProbe
from steerguard.fitting import Context, Contrast, Stage, collect, embed, versions
from steerguard.guard import Guard
from steerguard.metrics.benign import fires
from steerguard.metrics.reading import exchanges
from steerguard.probe import MIN_PAIRS, Probe, fit_probes
from steerguard.prompts import Prompt, conversation
from steerguard.traits import Split, Trait
from steerguard.traits.benign import benign, read_benign

STATISTICS = ("m", "mu_pos", "sigma_pos", "mu_neg", "sigma_neg", "delta_mu")
Measured = Literal["train", "select"]
"""The splits whose scenarios are answered anew."""
FIXED = ("architecture", "width", "depth")
"""What a new checkpoint must have in common with the old one."""


@dataclass(frozen=True)
class Change:
    """One number of one layer, before and after."""

    layer: int
    name: str
    "one of `STATISTICS`"
    old: float
    new: float
    sigma: float
    "the old spread within a class, root mean square of sigma_pos and sigma_neg: what a change is counted in"

    @property
    def sigmas(self) -> float | None:
        """new - old in sigmas; None where the old answers had no spread."""
        return (self.new - self.old) / self.sigma if self.sigma > 0 else None


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """A guard that was recalibrated, and what changed."""

    guard: Guard
    before: Guard
    changes: tuple[Change, ...]
    "of every layer, in the order of STATISTICS"
    fire_before: float | None
    "share of benign tokens that the old gates move on the new checkpoint; None where they see none"
    fire_after: float | None
    "the same of the new gates"
    below_before: tuple[float, ...] | None
    "of each layer, share of benign answers' tokens below the boundary when the old reference was taken; None without one"
    below_after: tuple[float, ...]
    "the same in the new reference"
    follows: bool
    "False: the rule's gate does not depend on these numbers (a threshold given by hand), so it is where it was"

    @property
    def boundary(self) -> tuple[Change, ...]:
        """How far the boundary of each layer has moved."""
        return tuple(change for change in self.changes if change.name == "m")


def recalibrate(
    guard: Guard,
    model: Backend,
    trait: Trait,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    store: Path | None = None,
    progress: Stage | None = None,
) -> Recalibrated:
    """The guard for this model, a new checkpoint of the one that it was made for; or for that one, with a benign reference.

    Args:
        trait: the one that the guard was fitted on.
        prompts: benign ones, for the reference and for where the gates fire.
        sampling: of all answers; by default as the guard was fitted.
        store: a folder that answers to the scenarios are kept in, so that an interrupted call goes on where it was.

    Raises:
        GuardMismatch: another architecture, width or depth.
        InputError: another trait, or too few benign prompts.
        ContrastError: too few answers, or `select` scenarios, or activations that are not finite.
        WeakProbe: the direction no longer reads the trait in this model.
    """
    _check(guard, model, trait)
    made = _fitted(guard)
    sampling = made.sampling if sampling is None else sampling
    # 1. where the classes stand now, and whether the direction still tells them apart
    contrasts = {split: _contrast(model, trait, split, sampling, store, progress) for split in get_args(Measured)}
    probes = _probes(guard, model, contrasts, made, progress)
    differs = sorted(guard.model.differences(model.identity))
    old = guard.for_model(model.identity, allow_mismatch=differs)
    new = replace(guard, probes=probes, model=model.identity)
    # 2. where the old gates fire on benign prompts, and where the new ones do
    read = exchanges(prompts, _answers(model, prompts, sampling, progress))
    fired = {
        key: sum(one.moved for one in found) / seen if (seen := sum(one.seen for one in found)) else None
        for key, found in fires(model, read, {"before": old, "after": new}, progress=progress).items()
    }
    # 3. what it was made from, and the reference
    changes = tuple(change for a, b in zip(guard.probes, probes, strict=True) for change in _changes(a, b))
    record = {
        "from": guard.digest, "model": guard.model.name, "differs": differs, "contrast": guard.provenance.get("contrast"),
        "changes": [asdict(change) for change in changes], "fire_before": fired["before"], "fire_after": fired["after"],
    }  # fmt: skip
    new = replace(new, provenance=_provenance(guard, contrasts, record))
    new = with_reference(new, model, prompts, sampling=sampling, progress=progress)
    then, now = _reference(guard), Reference.of_guard(new)
    assert now is not None
    return Recalibrated(
        guard=new, before=guard, changes=changes, fire_before=fired["before"], fire_after=fired["after"],
        below_before=None if then is None else tuple(layer.fire.mean for layer in then.layers),
        below_after=tuple(layer.fire.mean for layer in now.layers), follows=_follows(guard),
    )  # fmt: skip


def benign_prompts(path: Path | None, most: int) -> list[Prompt]:
    """Benign prompts of a file, or the bundled ones: at most so many, of every subject. Raises TraitError."""
    known = benign() if path is None else read_benign(path)
    order = np.random.default_rng(0).permutation(len(known))[:most]  # the file is sorted by subject
    return [conversation(known[i].system, known[i].turns) for i in order]


def trait_of(guard: Guard) -> str:
    """The name of the trait that the guard was fitted on. Raises InputError if its record does not say."""
    own = guard.provenance.get("trait")
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
        raise InputError(f"guard {guard.name!r} does not say on which trait it was fitted; name it with --trait")
    return str(own["name"])


def sampling_of(guard: Guard) -> Sampling:
    """How the guard's answers were drawn when it was fitted; the defaults where its record does not say. Raises InputError."""
    return _fitted(guard).sampling


# ------------------------------------------------------------------------------------------------ inside


@dataclass(frozen=True)
class _Fitted:
    """How a guard was fitted, as far as its record says."""

    sampling: Sampling
    context: Context
    halfway: bool
    "the boundary is halfway between the means, as of a mean difference"


def _fitted(guard: Guard) -> _Fitted:
    """Raises InputError for a record that `fit` does not write."""
    how = guard.provenance.get("fit", {})
    try:
        sampling = {**how.get("sampling", {})}
        if "stop" in sampling:
            sampling["stop"] = tuple(sampling["stop"])
        context = how.get("context", "own")
        if context not in get_args(Context):
            raise TypeError(f"there is no context {context!r}")
        return _Fitted(Sampling(**sampling), context, how.get("direction") == "mean-difference")
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(f"guard {guard.name!r}: its record of how it was fitted cannot be read: {error}") from error


def _check(guard: Guard, model: Backend, trait: Trait) -> None:
    differences = guard.model.differences(model.identity)
    found = {key: differences[key] for key in FIXED if key in differences}
    if found:
        raise GuardMismatch(
            f"guard {guard.name!r} was made for {guard.model.name}, and {model.identity.name} is no checkpoint of the same "
            f"model: {'; '.join(found.values())}. Fit a guard for it",
            tuple(found),
        )
    own = guard.provenance.get("trait")
    if isinstance(own, Mapping) and own.get("sha256") != trait.digest:
        raise InputError(
            f"guard {guard.name!r} was fitted on another version of the trait {own.get('name')!r} than {trait.name!r} is: its "
            "scenarios would not compare; give the trait that it was fitted on, or fit again"
        )
    known = {scenario.turns for scenario in trait.select}
    if len(known) < MIN_PAIRS:
        raise ContrastError(
            f"the trait {trait.name!r} has {len(known)} `select` scenarios with turns of their own; evidence needs at least "
            f"{MIN_PAIRS} on which the direction was not fitted"
        )


def _answers(model: Backend, prompts: Sequence[Prompt], sampling: Sampling, progress: Stage | None) -> list[Answer]:
    """The model's own answers, unguarded."""
    found: list[Answer] = []
    for start in range(0, len(prompts), BATCH):
        if progress is not None:
            progress("benign prompts answered", start, len(prompts))
        found += model.generate(list(prompts[start : start + BATCH]), sampling=sampling)
    if progress is not None:
        progress("benign prompts answered", len(prompts), len(prompts))
    return found


def _contrast(
    model: Backend, trait: Trait, split: Split, sampling: Sampling, store: Path | None, progress: Stage | None
) -> Contrast:
    path = None if store is None else store / f"contrast-{split}.jsonl"
    return collect(model, trait, split=split, sampling=sampling, store=path, progress=progress)


def _probes(
    guard: Guard, model: Backend, contrasts: Mapping[Measured, Contrast], made: _Fitted, progress: Stage | None
) -> tuple[Probe, ...]:
    """Every probe with statistics of the `train` answers and evidence of the `select` answers."""
    directions = {probe.layer: probe.v for probe in guard.probes}
    found = {}
    for split, contrast in contrasts.items():
        pos, neg = embed(model, contrast, context=made.context, layers=guard.layers, progress=progress)
        scenarios = ["\n".join(pair.scenario.turns) for pair in contrast.usable()]
        seed = made.sampling.seed
        found[split] = fit_probes(
            pos, neg, layers=guard.layers, scenarios=scenarios, direction=directions, seed=seed, allow_weak=True
        )
    out = []
    for old in guard.probes:
        train, select = found["train"][old.layer], found["select"][old.layer]
        if min(float(train.v @ old.v), float(select.v @ old.v)) < 0:
            raise WeakProbe(
                f"on {model.identity.name} the direction of layer {old.layer} reads the two poles the wrong way round; it "
                "belongs to another model. Fit again"
            )
        m = (train.mu_pos + train.mu_neg) / 2 if made.halfway else train.m
        out.append(replace(train, v=old.v, m=m, evidence=select.evidence))
    return tuple(out)


def _changes(old: Probe, new: Probe) -> list[Change]:
    sigma = math.sqrt((old.sigma_pos**2 + old.sigma_neg**2) / 2)
    return [Change(old.layer, key, float(getattr(old, key)), float(getattr(new, key)), sigma) for key in STATISTICS]


def _provenance(guard: Guard, contrasts: Mapping[Measured, Contrast], record: Mapping[str, Any]) -> dict[str, Any]:
    """The guard's, with what was taken anew; what the sweep chose by was of an earlier checkpoint, and says so."""
    train = contrasts["train"]
    kept = {key: value for key, value in guard.provenance.items() if key not in ("waived", "reference")}
    chosen = kept.get("chosen")
    earlier = kept.get("recalibrated")
    first = chosen if not isinstance(chosen, Mapping) or chosen.get("by") != "recalibration" else chosen.get("before")
    return {
        **kept,
        "contrast": {"sha256": train.digest, "pairs": len(train.usable()), "dropped": len(train.pairs) - len(train.usable())},
        "evidence": {"split": "select", "sha256": contrasts["select"].digest},
        "versions": versions(),
        "chosen": {"by": "recalibration", "before": first},
        "recalibrated": [*(earlier if isinstance(earlier, list) else []), dict(record)],
    }


def _reference(guard: Guard) -> Reference | None:
    """The old guard's reference; one that was taken of something else says nothing here."""
    try:
        return Reference.of_guard(guard)
    except InputError:
        return None


def _follows(guard: Guard) -> bool:
    """Whether the rule's gates depend on the probes' statistics at all."""
    for probe in guard.probes:
        twice = replace(probe, **{key: 2 * getattr(probe, key) + 1 for key in STATISTICS if key != "delta_mu"})
        if guard.rule.compile(twice) != guard.rule.compile(probe):
            return True
    return False
