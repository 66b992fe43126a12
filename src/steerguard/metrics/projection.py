"""Projection: where answers stand along a probe's direction, read by the unguarded model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerguard.backends.base import Backend
from steerguard.errors import InputError
from steerguard.metrics.reading import check_unguarded
from steerguard.probe import Probe
from steerguard.prompts import Prompt


def target_distance(model: Backend, conversations: Sequence[tuple[Prompt, str]], probe: Probe) -> list[float | None]:
    """How far each answer's mean projection stands from mu_pos, in sigma_pos: 0 is the mean of the aligned answers that
    the probe was fitted on, below 0 is towards the negative pole, above 0 beyond the aligned ones.

    Answers are read as fitting read them: as texts, averaged over their tokens, without the end of the turn. Give all
    arms one context, best the one that mu_pos was fitted in, so that it is the answer that differs and not the prompt.
    None for a blank answer.

    A probe that was fitted with the system prompts in context may read what was asked for rather than what was said;
    then arms do not differ here. One that was fitted with `context="neutral"` can only read what was said.

    Raises:
        InputError: a model inside `guarded`, a probe without spread, or residuals that are not finite.
    """
    if probe.sigma_pos <= 0:
        raise InputError(f"the probe of layer {probe.layer} has no spread (sigma_pos = {probe.sigma_pos:g}) to measure in")
    check_unguarded(model)
    out: list[float | None] = [None] * len(conversations)
    said = [i for i, (_, answer) in enumerate(conversations) if answer.strip()]
    if said:
        residuals = model.capture([conversations[i] for i in said], layers=[probe.layer])[:, 0]
        rho = residuals.astype(np.float64) @ probe.v.astype(np.float64)
        if not np.isfinite(rho).all():
            broken = said[int(np.flatnonzero(~np.isfinite(rho))[0])]
            raise InputError(f"answer {broken}: the residuals of layer {probe.layer} are not finite; load a wider dtype")
        for i, distance in zip(said, (rho - probe.mu_pos) / probe.sigma_pos, strict=True):
            out[i] = float(distance)
    return out
