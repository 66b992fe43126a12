"""What a guard does where it has nothing to do: how often it fires on benign prompts, and how far it moves what is there.

The prompts are given with the unguarded model's own answers, and read again. How a single-layer guard would fire is
told by one unguarded forward, exactly, for as many guards at once as one likes: what it reads is what the blocks up to
its layer make of the tokens, and those it does not touch. A guard of several layers needs one forward more for each
layer after its first, under the part of it that stands before.

    prompts = [conversation(b.system, b.turns) for b in benign()]          # from prompts and traits.benign
    measured = measure_benign(model, prompts, {"honesty": guard})
    measured.interval("honesty", "kl")
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Answer, Backend, Floats, Sampling, checked
from steerguard.errors import InputError
from steerguard.fitting import Stage
from steerguard.guard import Guard, Positions
from steerguard.metrics.likelihood import divergences
from steerguard.metrics.measured import Measured, Values
from steerguard.metrics.reading import Exchange, check_unguarded, each, exchanges
from steerguard.probe import Probe
from steerguard.prompts import Prompt
from steerguard.rules import shift

K = TypeVar("K", bound=Hashable)
Doubles = npt.NDArray[np.float64]

Metric = Literal["fire_rate", "shift", "norm_ratio", "kl"]
"""The first three are `Fired`'s, `kl` is `divergences`'."""


@dataclass(frozen=True)
class Fired:
    """What a guard would do to one conversation, as sums over the tokens that it looks at, each layer by itself."""

    seen: int
    "token-gate pairs that `positions` names, the last token of an answer left out, as in `Answer.tokens_seen`"
    moved: int
    "of those, how many the gates would move"
    total_shift: float
    "sum of |delta|, in class separations of its layer"
    total_norm: float
    "sum of |h'| / |h|, the residual's norm after and before"

    @property
    def fire_rate(self) -> float | None:
        """Share of what it sees that it would move, 0 to 1; None where it sees nothing."""
        return self.moved / self.seen if self.seen else None

    @property
    def shift(self) -> float | None:
        """Mean |delta| in class separations, exactly 0 where it never fires; None where it sees nothing."""
        return self.total_shift / self.seen if self.seen else None

    @property
    def norm_ratio(self) -> float | None:
        """Mean norm after over norm before, exactly 1 where it never fires; None where it sees nothing."""
        return self.total_norm / self.seen if self.seen else None


def fires(
    model: Backend, conversations: Sequence[Exchange], guards: Mapping[K, Guard], *, progress: Stage | None = None
) -> dict[K, list[Fired]]:
    """What each guard would do to each conversation, read with the unguarded model; see the module.

    A `response` guard sees nothing of a conversation whose answer has fewer than two tokens: the last is never read.

    Raises:
        InputError: a model inside `guarded`, residuals that are not finite, or a probe whose classes do not differ.
        GuardMismatch: a guard of another model.
    """
    check_unguarded(model)
    for guard in guards.values():
        checked(guard, model.identity)
        flat = [probe.layer for probe in guard.probes if probe.delta_mu == 0]
        if flat:
            raise InputError(
                f"guard {guard.name!r}: the class means of layer {flat[0]} are the same: there is no distance to tell shifts in"
            )
    gates = {key: [(probe, gate.row()) for probe, gate in guard.gates()] for key, guard in guards.items()}
    out: dict[K, list[Fired]] = {key: [] for key in guards}
    for prompt, answer in each(conversations, progress, "conversations read for where guards fire"):
        read = _Read(model, prompt, tuple(answer)[:-1])
        for key, guard in guards.items():
            parts = [_fired(*read.before(guard, i), row, probe.delta_mu) for i, (probe, row) in enumerate(gates[key])]
            out[key].append(Fired(*(sum(values) for values in zip(*map(astuple, parts), strict=True))))
    return out


class _Read:
    """One conversation's projections and norms before a guard acts, each computed once."""

    def __init__(self, model: Backend, prompt: Prompt, answer: tuple[int, ...]) -> None:
        self._model, self._prompt, self._answer = model, prompt, answer
        self._unguarded: Floats | None = None
        self._known: dict[tuple[int, int], tuple[Floats, Doubles]] = {}

    def before(self, guard: Guard, i: int) -> tuple[Floats, Doubles]:
        """rho and |h| `[tokens]` that the guard's i-th gate sees, of the tokens that `positions` names."""
        probe = guard.probes[i]
        if i == 0:
            key = (probe.layer, id(probe.v))  # the probes outlive this object
            if key not in self._known:
                if self._unguarded is None:
                    self._unguarded = self._model.residuals(self._prompt, self._answer)
                self._known[key] = _project(self._unguarded, probe)
            rho, norm = self._known[key]
        else:
            part = replace(guard, probes=guard.probes[:i])
            rho, norm = _project(self._model.residuals(self._prompt, self._answer, guards=part), probe)
        start = 0 if guard.positions == "all" else len(rho) - len(self._answer)
        return rho[start:], norm[start:]


def _project(residuals: Floats, probe: Probe) -> tuple[Floats, Doubles]:
    """rho and |h| of every token. Raises InputError if one is no number."""
    h = residuals[probe.layer]
    rho = h @ probe.v
    if not np.isfinite(rho).all():
        raise InputError(f"the residuals of layer {probe.layer} are not finite; load the model in a wider dtype")
    return rho, np.linalg.norm(h.astype(np.float64), axis=1)


def _fired(rho: Floats, norm: Doubles, gate: Floats, delta_mu: float) -> Fired:
    """One gate on the tokens of one conversation."""
    delta = shift(np, rho, gate).astype(np.float64)
    after = np.sqrt(np.maximum(norm**2 + 2 * delta * rho + delta**2, 0))  # |h + delta v|, v a unit vector
    ratio = np.where(delta != 0, after / np.maximum(norm, np.finfo(np.float32).tiny), 1.0)
    return Fired(len(rho), int(np.count_nonzero(delta)), float(np.abs(delta).sum()) / abs(delta_mu), float(ratio.sum()))


# ---------------------------------------------------------------------------------------------- all of it at once


def measure_benign(
    model: Backend,
    prompts: Sequence[Prompt],
    guards: Mapping[str, Guard],
    *,
    answers: Sequence[Answer] | None = None,
    sampling: Sampling = Sampling(),
    metrics: Collection[Metric] = get_args(Metric),
    kl_positions: Positions = "response",
    progress: Stage | None = None,
) -> Measured:
    """Every metric of every guard on benign prompts, one value for each prompt; the guards are the arms.

    Args:
        answers: the unguarded model's answers to the prompts; asked for now if None.
        kl_positions: which predictions `kl` looks at; see `likelihood.divergences`.

    Raises:
        InputError: a model inside `guarded`, or a metric that does not exist.
    """
    unknown = sorted(set(metrics) - set(get_args(Metric)))
    if unknown:
        raise InputError(f"there is no metric {unknown[0]!r}; there are {', '.join(get_args(Metric))}")
    check_unguarded(model)
    if answers is None:
        answers = model.generate(list(prompts), sampling=sampling)
    read = exchanges(prompts, answers)
    values: dict[str, dict[str, Values]] = {name: {} for name in guards}
    fired = fires(model, read, guards, progress=progress) if set(metrics) - {"kl"} else {}
    for name, found in fired.items():
        values[name] |= {m: tuple(getattr(one, m) for one in found) for m in get_args(Metric) if m in metrics and m != "kl"}
    if "kl" in metrics:
        idle = {name: [one.moved == 0 for one in found] for name, found in fired.items()} or None
        for name, moved in divergences(model, read, guards, positions=kl_positions, idle=idle, progress=progress).items():
            values[name]["kl"] = tuple(moved)
    return Measured(values, tuple(range(len(prompts))))
