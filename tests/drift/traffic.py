"""Simulated traffic: requests whose tokens stand together, on a guard of a model that is never loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

import tiny
from steerguard.drift import Monitor, Reference
from steerguard.drift.betting import Evidence, nothing
from steerguard.guard import Guard
from steerguard.identity import ModelIdentity
from steerguard.rules import StTP

Doubles = npt.NDArray[np.float64]

TOKENS = 12
BETWEEN, WITHIN = 0.7, 0.7
"""Standard deviations of a request's own level and of its tokens about it: half of the variance is shared by a whole request."""
TOKEN_SIGMA = float(np.hypot(BETWEEN, WITHIN))
MODEL = ModelIdentity("m", "LlamaForCausalLM", 8, 4, {"w": "0"}, "t", "c")


@cache
def guard(boundary: float = -1.5) -> Guard:
    """A guard whose boundary benign tokens are rarely below."""
    probe = replace(tiny.probe(1, 8), m=boundary, mu_neg=boundary - 1, mu_pos=boundary + 1)
    return tiny.guard(MODEL, StTP(1), (probe,))


def requests(rng: np.random.Generator, *shape: int, shift: float = 0.0, tokens: int = TOKENS) -> Doubles:
    """Projections `[..., tokens]` of that many requests."""
    return rng.normal(0, BETWEEN, (*shape, 1)) + rng.normal(0, WITHIN, (*shape, tokens)) + shift


def reference(seed: int, n: int = 500) -> Reference:
    """A reference of n requests in which nothing has moved."""
    return Reference.of_requests(guard(), [[rho] for rho in requests(np.random.default_rng([7, seed]), n)], seed=seed)


def statistics(reference: Reference, rho: Doubles) -> Doubles:
    """What `Reference.statistics` gives, for many requests `[..., tokens]` at once: `[..., 1, 2]`."""
    layer = reference.layers[0]
    ranks = np.interp(rho, layer.quantiles, np.linspace(0, 1, len(layer.quantiles)))
    return np.stack([ranks.mean(-1), (rho < layer.m).mean(-1)], -1)[..., None, :]


def log_mean(logs: Doubles) -> Doubles:
    """log of the mean over bounds and stakes, for each run."""
    flat = logs.reshape(len(logs), -1)
    found: Doubles = np.logaddexp.reduce(flat, -1) - np.log(flat.shape[-1])
    return found


def watch(monitor: Monitor, values: Doubles) -> tuple[Doubles, Doubles]:
    """log evidence `[runs, requests]` of both alarms, over statistics `[runs, requests, 1, 2]`."""
    state = nothing(len(values), *monitor.bounds.shape)
    total, recent = [], []
    for t in range(values.shape[1]):
        state = state.then(step(monitor, values[:, t]))
        total.append(log_mean(state.total))
        recent.append(log_mean(state.recent))
    return np.stack(total, 1), np.stack(recent, 1)


def step(monitor: Monitor, values: Doubles) -> Evidence:
    return monitor.evidence(values)
