"""The kernel as it runs inside a forward: what `rules.correct` says, bit for bit, in fewer steps.

A step of a small model takes a few milliseconds, and each small operation of torch some microseconds, on any device.
So where the residual is in the host's memory, all that has one number per token (projection, delta, counters) is left
to numpy, and a residual that no gate moves is handed back as it came; on an accelerator nothing may wait for a result,
and what is saved are the branches that a gate does not have.

This module knows tensors and gates; it knows no rule by name, no positions and no hooks. Both kernels are tested equal
to `rules.correct`, which stays the one to read.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from steerguard.rules import shift


class Kernel(Protocol):
    """One stage at work on one block's device, with its counters."""

    def __call__(self, h: Tensor, where: Tensor | None, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """h' `[rows, tokens, d]`, and rho and delta `[rows, tokens]` float32, of h.

        Args:
            where: `[rows, tokens]` true where the gate may act; None for everywhere.
            alive: `[rows]` true for the rows that count; None for all.
        """
        ...

    def tally(self) -> tuple[list[int], list[float]]:
        """For each row, the tokens moved so far and the sum of |delta|. Waits for the device."""
        ...


def kernel(v: Tensor, gate: Tensor, rows: int, device: torch.device) -> Kernel:
    """The kernel for a direction `[d]` or `[rows, 1, d]` and a gate `[6]` or `[rows, 1, 6]`, float32 on the host."""
    return OnHost(v, gate, rows) if device.type == "cpu" else OnDevice(v, gate, rows, device)


class OnHost:
    """For residuals in the host's memory, where looking at a number costs nothing. Inference only: no gradients."""

    def __init__(self, v: Tensor, gate: Tensor, rows: int) -> None:
        self._v, self._gate = v, gate.numpy()
        self._moved = np.zeros(rows, np.int64)
        self._size = np.zeros(rows, np.float64)

    def __call__(self, h: Tensor, where: Tensor | None, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # 1. the projection, in torch: the sum's order decides its last bit
        h32 = h.float()
        along = h32 * self._v
        rho = along.sum(-1)
        # 2. how far to move it: the reference itself, on numpy
        with np.errstate(all="ignore"):
            delta = shift(np, rho.numpy(), self._gate)
        if where is not None:
            delta = np.where(where.numpy(), delta, np.float32(0))
        # 3. move it; what the gate leaves alone stays bit for bit
        moved = np.count_nonzero(delta, axis=1)
        total = int(moved.sum())
        if total == 0:
            return h, rho, torch.from_numpy(delta)
        out = torch.mul(torch.from_numpy(delta[..., None]), self._v, out=along).add_(h32).to(h.dtype)
        if total < delta.size:
            out = torch.where(torch.from_numpy((delta != 0)[..., None]), out, h)
        # 4. count
        size = np.abs(delta).sum(axis=1, dtype=np.float64)
        if alive is not None:
            counts = alive.cpu().numpy()
            moved, size = moved * counts, size * counts
        self._moved += moved
        self._size += size
        return out, rho, torch.from_numpy(delta)

    def tally(self) -> tuple[list[int], list[float]]:
        return self._moved.tolist(), self._size.tolist()


class OnDevice:
    """For residuals on an accelerator: nothing waits for a result."""

    def __init__(self, v: Tensor, gate: Tensor, rows: int, device: torch.device) -> None:
        knee, _, _, above_a, above_b, cap = (part.numpy() for part in gate.unbind(-1))
        self._constant = bool((knee == -math.inf).all())
        self._one_sided = not above_a.any() and not above_b.any()
        self._capped = bool((cap < math.inf).any())
        self._v = v.to(device)
        self._gate = [part.contiguous() for part in gate.to(device).unbind(-1)]
        self._moved = torch.zeros(rows, dtype=torch.int64, device=device)
        self._size = torch.zeros(rows, dtype=torch.float32, device=device)

    def __call__(self, h: Tensor, where: Tensor | None, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # 1. the projection
        h32 = h.float()
        along = h32 * self._v
        rho = along.sum(-1)
        # 2. how far to move it
        delta = self._shift(rho)
        if where is not None:
            delta = torch.where(where, delta, 0.0)
        # 3. move it; what the gate leaves alone stays bit for bit
        out = torch.mul(delta[..., None], self._v, out=along).add_(h32).to(h.dtype)
        out = torch.where((delta != 0)[..., None], out, h)
        # 4. count, on the device
        counted = delta if alive is None else delta * alive.to(delta.device)[:, None]
        one = counted.shape[1] == 1
        self._moved.add_(counted[:, 0] != 0 if one else torch.count_nonzero(counted, dim=1))
        self._size.add_(counted[:, 0].abs() if one else counted.abs().sum(1))
        return out, rho, delta

    def _shift(self, rho: Tensor) -> Tensor:
        """`rules.shift` without the branches that this gate does not have."""
        knee, below_a, below_b, above_a, above_b, cap = self._gate
        if self._constant:
            delta = above_a + above_b * rho
        else:
            below = below_a + below_b * rho
            if self._capped:
                below = torch.minimum(below, cap - rho)
            delta = torch.where(rho < knee, below, 0.0 if self._one_sided else above_a + above_b * rho)
        return delta.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def tally(self) -> tuple[list[int], list[float]]:
        return self._moved.tolist(), self._size.tolist()
