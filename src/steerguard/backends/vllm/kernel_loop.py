"""The kernel on a CPU: what `kernel.steer` does, as one compiled loop over the tokens.

A decode step of a small model takes a few milliseconds, and the portable kernel's small operations half of one. Here a
token that nothing acts on costs one read. Any other token's residual is read once, stays in the processor's cache through
every stage, and is written back only if a stage moved it. Products and sums are rounded one by one, as torch rounds
them, not fused; a token's projection is summed in an order of its own, the same whatever else is in the batch.

`kernel` is the reference. This module needs Numba, which comes with vLLM; nothing imports it but the op on a CPU. The
loop is compiled when it first runs, in the proof at start, once for each dtype and for pairs and single tensors.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from steerguard.backends.vllm.tables import BINS, LayerTables


def fits(hidden: Tensor, residual: Tensor | None) -> bool:
    """Whether the loop takes these: contiguous, both float32 or both bfloat16."""
    if hidden.dtype not in _LOOPS or not hidden.is_contiguous():
        return False
    return residual is None or (residual.dtype == hidden.dtype and residual.is_contiguous())


def steer(hidden: Tensor, residual: Tensor | None, slots: Tensor, table: LayerTables) -> None:
    """Correct the residual hidden (+ residual) of every token in place; see `kernel.steer`. They must `fits`."""
    halves = (_array(hidden), None if residual is None else _array(residual))
    _LOOPS[hidden.dtype](*halves, slots.numpy(), *table.arrays)


def _array(x: Tensor) -> Any:
    """The same memory; bfloat16, which numpy does not know, as its bits."""
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.uint16).numpy()


# -------------------------------------------------------------------------------------------------- compiled


@numba.njit(inline="always")
def _same(x: Any) -> Any:
    return x


@numba.njit(inline="always")
def _widened(bits: Any) -> Any:
    """bfloat16 bits as float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def _narrowed(x: Any) -> Any:
    """A float32 as bfloat16 bits, to nearest even."""
    bits = np.float32(x).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
    return rounded if x == x else np.uint16(0x7FC0)


@numba.njit(fastmath={"reassoc"})
def _dot(h: Any, v: Any) -> Any:
    """Products rounded, then summed in any fixed order."""
    total = np.float32(0)
    for j in range(len(h)):
        total += h[j] * v[j]
    return total


@numba.njit
def _shift(rho: Any, gate: Any) -> Any:
    """`rules.shift` of one projection."""
    if rho < gate[0]:
        below, room = gate[1] + gate[2] * rho, gate[5] - rho
        delta = room if room < below or room != room else below
    else:
        delta = gate[3] + gate[4] * rho
    return delta if abs(delta) < np.inf else np.float32(0)  # not finite: left alone


@numba.njit
def _bin(rho: Any, axis: Any) -> Any:
    place = (rho - axis[0]) * axis[1]
    return int(min(max(place, np.float32(0)), np.float32(BINS - 1))) if place == place else 0  # NaN: the first bin


def _loop(widened: Any, narrowed: Any, zero: Any) -> Any:
    """The loop over tokens whose elements are read and written so."""

    @numba.njit
    def loop(
        hidden: Any, residual: Any, slots: Any, vs: Any, direction: Any, gates: Any, axis: Any, counts: Any, sums: Any,
        rhos: Any, deltas: Any,
    ) -> None:  # fmt: skip
        tokens, width = hidden.shape
        h = np.empty(width, np.float32)
        for token in range(tokens):
            row = slots[token]
            if row == 0:
                continue
            # 1. the residual as the next block would read it, in the model's own dtype
            for j in range(width):
                if residual is None:
                    h[j] = widened(hidden[token, j])
                else:
                    h[j] = widened(narrowed(widened(hidden[token, j]) + widened(residual[token, j])))
            # 2. stage by stage: each sees what the one before left
            touched = False
            for k in range(direction.shape[1]):
                along = direction[row, k]
                if along < 0:
                    continue
                rho = _dot(h, vs[along])
                delta = _shift(rho, gates[row, k])
                rhos[k, token], deltas[k, token] = rho, delta
                counts[along, 0] += 1
                counts[along, 2 + _bin(rho, axis[along])] += 1
                if delta != 0:
                    touched = True
                    for j in range(width):
                        h[j] = widened(narrowed(h[j] + delta * vs[along, j]))
                    counts[along, 1] += 1
                    sums[along, 0] += abs(delta)
                    sums[along, 1] = max(sums[along, 1], abs(delta))
            # 3. write what moved; the other half becomes 0, so that the sum is exactly h
            if touched:
                for j in range(width):
                    if residual is None:
                        hidden[token, j] = narrowed(h[j])
                    else:
                        hidden[token, j], residual[token, j] = zero, narrowed(h[j])

    return loop


_LOOPS = {
    torch.float32: _loop(_same, _same, np.float32(0)),
    torch.bfloat16: _loop(_widened, _narrowed, np.uint16(0)),
}
