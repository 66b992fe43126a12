"""References: what benign traffic looks like on a guard's directions.

One request gives two numbers per steered layer, both in [0, 1] and both means over the tokens of its answer: its `rank`
(where its projections stand among those of the reference, 0 the lowest, 1 the highest) and its `fire` (the share of its
tokens below the boundary m). Tokens of one answer are alike, so a request is one observation, however long. Prompts are
left out: their length and wording belong to whoever wrote them, such as one system prompt before every request.

A reference keeps the ranks' ruler, 64 quantiles of a fifth of its requests, and the ranges in which the means of both
numbers lie; that of the rank comes from the other four fifths, which did not make the ruler. It stands in a guard's
provenance, which leaves the guard's digest as it is.

This module knows projections and guards. It knows no test, and no model but by its protocol.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from steerguard import files
from steerguard.backends.base import Answer, Backend, Sampling
from steerguard.drift.betting import Doubles, interval
from steerguard.errors import InputError, NotSteering
from steerguard.files import Malformed, canonical_json
from steerguard.fitting import Stage
from steerguard.guard import Guard
from steerguard.probe import Probe
from steerguard.prompts import Prompt

RECORD = "reference"
"""The key of a guard's provenance."""
SCHEMA = 1
QUANTILES = 64
"""Parts of equal weight that the projections are cut into."""
RULER = 5
"""One request in so many makes the ruler; a ruler need not be fine, the ranges must."""
MIN_REQUESTS = 20
ERROR = 0.001
"""Probability that any of a reference's ranges misses its mean."""
STATISTICS = ("rank", "fire")
BATCH = 64
"""Prompts that are answered at a time."""

Projections = Sequence[npt.NDArray[np.floating[Any]]]
"""One request: of each steered layer, by increasing layer, rho `[tokens]` of the answer's tokens that were read."""


@dataclass(frozen=True)
class Range:
    """A mean over requests, 0 to 1, and where it lies."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerReference:
    """Benign traffic on one steered layer."""

    layer: int
    m: float
    "the boundary that `fire` was taken at"
    direction: str
    "SHA-256 of v"
    quantiles: tuple[float, ...]
    "[QUANTILES + 1] projections, the smallest first; between two of them lies an equal share, every request weighing the same"
    rank: Range
    fire: Range

    def of(self, rho: npt.NDArray[np.floating[Any]]) -> tuple[float, float]:
        """rank and fire of one request."""
        ranks = np.interp(rho, self.quantiles, np.linspace(0, 1, len(self.quantiles)))
        return float(ranks.mean()), float((rho < self.m).mean())


@dataclass(frozen=True)
class Reference:
    """Benign traffic on every steered layer of a guard."""

    layers: tuple[LayerReference, ...]
    n: int
    "requests"
    acting: bool
    "whether the guard acted on them; traffic that is compared must have been guarded likewise"
    source: Mapping[str, Any] = field(default_factory=dict)
    "JSON values: whose requests, from which model, drawn how"

    @classmethod
    def of_requests(
        cls, guard: Guard, requests: Sequence[Projections], *, acting: bool = True, source: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> Reference:  # fmt: skip
        """The reference of requests that are known to be benign, such as an operator's own first thousand.

        Args:
            requests: see `projections`; they should be independent of each other and alike traffic to come.
            acting: whether the guard acted on them, or only read.

        Raises:
            InputError: fewer than `MIN_REQUESTS`, or projections that are not those of this guard.
        """
        if len(requests) < MIN_REQUESTS:
            raise InputError(f"a reference needs at least {MIN_REQUESTS} benign requests with answers, got {len(requests)}")
        checked = [check_projections(request, len(guard.layers)) for request in requests]
        order = np.random.default_rng(seed).permutation(len(checked))  # files are sorted by subject, the parts must not be
        layers = tuple(
            _layer(probe, [checked[i][at] for i in order], ERROR / len(guard.layers)) for at, probe in enumerate(guard.probes)
        )
        return cls(layers, len(checked), acting, dict(source or {}))

    @classmethod
    def of_guard(cls, guard: Guard) -> Reference | None:
        """The reference that a guard carries; None if it carries none. Raises InputError for one that is not its own."""
        record = guard.provenance.get(RECORD)
        if record is None:
            return None
        try:
            found = _read(record)
        except Malformed as error:
            raise InputError(f"guard {guard.name!r}: {error}; take its reference again") from error
        found.check(guard)
        return found

    def check(self, guard: Guard) -> None:
        """Refuse a guard with other layers, directions or boundaries. Raises InputError."""
        own = [(layer.layer, layer.direction, layer.m) for layer in self.layers]
        if own != [(probe.layer, _direction(probe), probe.m) for probe in guard.probes]:
            raise InputError(
                f"guard {guard.name!r}: the benign reference was taken on other layers, directions or boundaries; take it again "
                "with `steerguard recalibrate`"
            )

    def statistics(self, request: Projections) -> Doubles:
        """`[layers, 2]` rank and fire of one request. Raises InputError for projections that are not of such a guard."""
        rows = check_projections(request, len(self.layers))
        return np.array([layer.of(rho) for layer, rho in zip(self.layers, rows, strict=True)])

    def on(self, guard: Guard) -> Guard:
        """The guard with this reference in its provenance; its digest stays. Raises InputError if they do not fit."""
        self.check(guard)
        return replace(guard, provenance={**guard.provenance, RECORD: self.record()})

    def record(self) -> dict[str, Any]:
        """The reference as JSON values."""
        return {"schema": SCHEMA, **asdict(self), "source": dict(self.source)}

    @property
    def digest(self) -> str:
        """SHA-256 of what a monitor reads of it."""
        return hashlib.sha256(canonical_json([asdict(layer) for layer in self.layers]).encode()).hexdigest()


def with_reference(
    guard: Guard,
    model: Backend,
    prompts: Sequence[Prompt],
    *,
    acting: bool = True,
    sampling: Sampling = Sampling(),
    batch: int = BATCH,
    progress: Stage | None = None,
) -> Guard:
    """The guard with a reference taken on the model's own answers to benign prompts.

    Args:
        prompts: such as the bundled ones of `traits.benign`.
        acting: whether the guard acts on the answers, as it will when it serves; False for a guard that is to serve in shadow.

    Raises:
        InputError: too few prompts whose answers have at least two tokens.
        GuardMismatch: a guard of another model.
    """
    used = guard if acting else guard.watching()
    requests: list[Projections] = []
    for start in range(0, len(prompts), batch):
        if progress is not None:
            progress("benign prompts answered for the reference", start, len(prompts))
        for answer in model.generate(list(prompts[start : start + batch]), guards=used, sampling=sampling, trace=True):
            if (found := projections(answer, guard)) is not None:
                requests.append(found)
    if progress is not None:
        progress("benign prompts answered for the reference", len(prompts), len(prompts))
    asked = hashlib.sha256(canonical_json([_plain(prompt) for prompt in prompts]).encode()).hexdigest()
    source = {
        "prompts": len(prompts), "sha256": asked, "model": model.identity.name,
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
    }  # fmt: skip
    return Reference.of_requests(guard, requests, acting=acting, source=source, seed=sampling.seed).on(guard)


def projections(answer: Answer, guard: Guard, *, index: int = 0) -> Projections | None:
    """One request for a reference or a monitor, of an answer with its traces; None if no token of the answer was read.

    Args:
        index: which of the row's guards it is.

    Raises:
        NotSteering: the guard left no trace of every token on each of its layers.
    """
    read = len(answer.prompt_ids) + len(answer.ids) - 1
    traces = {trace.layer: trace.rho for trace in answer.traces if trace.guard == index}
    if list(traces) != list(guard.layers) or any(len(rho) != read for rho in traces.values()):
        raise NotSteering(f"guard {guard.name!r} left no trace of every token of an answer; generate with trace=True")
    own = [traces[layer][len(answer.prompt_ids) :] for layer in guard.layers]
    return own if len(answer.ids) > 1 else None


def check_projections(request: Projections, layers: int) -> list[Doubles]:
    """The projections of one request as float64. Raises InputError if they are not `layers` rows of finite numbers."""
    rows = [np.asarray(rho, np.float64) for rho in request]
    if len(rows) != layers or any(rho.ndim != 1 or not len(rho) for rho in rows) or len({len(rho) for rho in rows}) != 1:
        got = ", ".join(str(list(rho.shape)) for rho in rows) or "none"
        raise InputError(f"a request has projections [tokens] of each of {layers} layers, at least one token, got {got}")
    if not all(np.isfinite(rho).all() for rho in rows):
        raise InputError("projections must be finite; load the model in a wider dtype")
    return rows


# ------------------------------------------------------------------------------------------------ inside


def _layer(probe: Probe, requests: Sequence[Doubles], error: float) -> LayerReference:
    """One layer's reference, of requests in an order that says nothing of them; both ranges hold but for that error.

    A request that made the ruler has no say in the range of the rank: the ranks of the others are numbers like those of
    any request to come.
    """
    ruler = max(len(requests) // RULER, 2)
    nowhere = Range(0.5, 0.0, 1.0)
    blank = LayerReference(probe.layer, float(probe.m), _direction(probe), _quantiles(requests[:ruler]), nowhere, nowhere)
    ranks, fires = np.array([blank.of(rho) for rho in requests]).T
    ranges = [Range(float(x.mean()), *interval(x, error / len(STATISTICS))) for x in (ranks[ruler:], fires)]
    return replace(blank, rank=ranges[0], fire=ranges[1])


def _quantiles(requests: Sequence[Doubles]) -> tuple[float, ...]:
    """QUANTILES + 1 quantiles of all tokens, every request weighing the same."""
    rho = np.concatenate(requests)
    weight = np.concatenate([np.full(len(own), 1 / len(own)) for own in requests])
    order = np.argsort(rho, kind="stable")
    share = np.cumsum(weight[order]) - weight[order] / 2
    found = np.interp(np.linspace(0, 1, QUANTILES + 1), share / weight.sum(), rho[order])
    return tuple(float(f"{x:.7g}") for x in found)


def _direction(probe: Probe) -> str:
    return hashlib.sha256(probe.v.astype("<f4").tobytes()).hexdigest()


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


_RECORD: dict[str, files.Kind] = {"schema": int, "layers": list, "n": int, "acting": bool, "source": dict}
_LAYER: dict[str, files.Kind] = {
    "layer": int, "m": float, "direction": str, "quantiles": list, "rank": dict, "fire": dict,
}  # fmt: skip
_RANGE: dict[str, files.Kind] = {"mean": float, "low": float, "high": float}


def _read(record: object) -> Reference:
    """The reference of a record. Raises Malformed."""
    found = files.take(record, "its reference", _RECORD)
    if found["schema"] != SCHEMA:
        raise Malformed(f"its reference is version {found['schema']}, this steerguard reads {SCHEMA}")
    if found["n"] < MIN_REQUESTS:
        raise Malformed(f"its reference has {found['n']} requests, at least {MIN_REQUESTS} are needed")
    layers = tuple(_read_layer(layer) for layer in found["layers"])
    return Reference(layers, found["n"], found["acting"], found["source"])


def _read_layer(record: object) -> LayerReference:
    found = files.take(record, "a layer of its reference", _LAYER)
    quantiles = tuple(float(files.of_kind(x, "a quantile of its reference", float)) for x in found["quantiles"])
    if len(quantiles) != QUANTILES + 1 or any(b < a for a, b in itertools.pairwise(quantiles)):
        raise Malformed(f"its reference must have {QUANTILES + 1} quantiles that do not fall, got {files.shown(quantiles)}")
    ranges = {}
    for key in STATISTICS:
        one = files.take(found[key], f"{key!r} of its reference", _RANGE)
        if not 0 <= one["low"] <= one["mean"] <= one["high"] <= 1:
            raise Malformed(f"{key!r} of its reference must have 0 <= low <= mean <= high <= 1, got {files.shown(one)}")
        ranges[key] = Range(**{name: float(x) for name, x in one.items()})
    return LayerReference(found["layer"], float(found["m"]), found["direction"], quantiles, **ranges)
