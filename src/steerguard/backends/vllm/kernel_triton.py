"""The kernel on a GPU: what `kernel.steer` and `kernel.keep` do, in one launch and one pass over the residual.

One program per token. It reads the token's slot; a token that nothing acts on costs that one read. Any other token's
residual is loaded once, as a whole, and stays in registers through every stage; it is written back only if a stage
moved it. Nothing is allocated and nothing waits, the grid is the tokens of `hidden`, and whatever may change between
two forwards stands in the table: so a launch that a CUDA graph has captured does right by every later batch.

A token's projection is summed in an order of its own, the same whatever else is in the batch. Products and sums are
rounded one by one, as torch rounds them, not fused.

`kernel` is the reference. This module needs Triton; nothing imports it but the op on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from steerguard.backends.vllm.tables import BINS, LayerTables
from steerguard.errors import Unsupported

PER_WARP = 1024
"""Elements of a residual that one warp holds: 32 per thread, four loads of 16 bytes at two bytes each, and no register spilt."""
MAX_WARPS = 32


def steer(hidden: Tensor, residual: Tensor | None, slots: Tensor, table: LayerTables, *, keep: bool = True) -> None:
    """Correct the residual hidden (+ residual) of every token in place, as `kernel.steer` does.

    Args:
        hidden: [T, d] what a block returned.
        residual: [T, d] the other half of the pair; None where a block returns one tensor.
        slots: [T or more] int32 row of each token; 0 for tokens that nothing acts on.
        table: of this layer; its counters and records are written.
        keep: keep the corrected residual of every token, if this table keeps any, as `kernel.keep` does.

    Raises:
        Unsupported: the tensors are not laid out as the kernel reads them.
    """
    _check(hidden, residual, slots, table)
    kept = table.kept if keep else None
    block, warps = launch(hidden.shape[1])
    _steer[(len(hidden),)](
        hidden, residual, slots, table.v, table.direction, table.gates, table.axis, table.counts, table.sums, table.rho,
        table.delta, kept, hidden.stride(0), 0 if residual is None else residual.stride(0), table.rho.stride(0),
        WIDTH=hidden.shape[1], STAGES=table.direction.shape[1], BINS=BINS, BLOCK=block, num_warps=warps, num_stages=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def launch(width: int) -> tuple[int, int]:
    """Elements of one program (a power of two that holds a whole residual), and its warps."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // PER_WARP, 1), MAX_WARPS)


def _check(hidden: Tensor, residual: Tensor | None, slots: Tensor, table: LayerTables) -> None:
    halves = [hidden] if residual is None else [hidden, residual]
    shape = (len(hidden), table.v.shape[1])
    if any(half.shape != shape or half.stride(1) != 1 for half in halves) or len(slots) < len(hidden):
        raise Unsupported(
            f"the kernel steers residuals of {shape} whose rows are contiguous, with a slot each; got "
            f"{[(tuple(half.shape), half.stride()) for half in halves]} and {len(slots)} slots"
        )


# ------------------------------------------------------------------------------------------------ on the device


@triton.jit
def _steer(
    hidden: tl.tensor, residual: tl.tensor, slots: tl.tensor, v: tl.tensor, direction: tl.tensor, gates: tl.tensor,
    axis: tl.tensor, counts: tl.tensor, sums: tl.tensor, rhos: tl.tensor, deltas: tl.tensor, kept: tl.tensor,
    hidden_row: tl.tensor, residual_row: tl.tensor, record_row: tl.tensor,
    WIDTH: tl.constexpr, STAGES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One token. Pointers to what `steer` was given, then the distance of two rows of each, in elements."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(slots + token)
    if kept is None:  # noqa: SIM102  known when this is compiled, and the row is not
        if row == 0:
            return
    # 1. the residual as the next block would read it, in the model's own dtype
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    here = hidden + token * hidden_row + at
    there = here
    h = tl.load(here, mask=inside, other=0.0)
    if residual is not None:
        there = residual + token * residual_row + at
        h = _sum(h, tl.load(there, mask=inside, other=0.0))
    # 2. stage by stage: each sees what the one before left
    touched = row < 0
    for k in range(STAGES):
        stage = row * STAGES + k
        along = tl.load(direction + stage)
        if along >= 0:
            h32 = h.to(tl.float32)
            unit = tl.load(v + along.to(tl.int64) * WIDTH + at, mask=inside, other=0.0)
            rho = tl.sum(h32 * unit, axis=0)
            delta = _shift(rho, gates + stage * 6)
            moves = delta != 0
            h = tl.where(moves, (h32 + delta * unit).to(h.dtype), h)
            touched = touched | moves
            tl.store(rhos + k * record_row + token, rho)
            tl.store(deltas + k * record_row + token, delta)
            _count(counts + along * (2 + BINS), sums + along * 2, axis + along * 2, rho, delta, BINS)
    # 3. write what moved; the other half becomes 0, so that the sum is exactly h
    if touched:
        if residual is not None:
            tl.store(here, tl.zeros((BLOCK,), here.dtype.element_ty), mask=inside)
        tl.store(there, h, mask=inside)
    if kept is not None:
        tl.store(kept + token * WIDTH + at, h, mask=inside)


@triton.jit
def _sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b as torch adds them: in float32, rounded to their own dtype if they have one in common."""
    total = a.to(tl.float32) + b.to(tl.float32)
    return total.to(a.dtype) if a.dtype == b.dtype else total


@triton.jit
def _shift(rho: tl.tensor, gate: tl.tensor) -> tl.tensor:
    """`rules.shift` of one projection; gate points to the six numbers."""
    below = tl.load(gate + 1) + tl.load(gate + 2) * rho
    below = tl.minimum(below, tl.load(gate + 5) - rho, propagate_nan=tl.PropagateNan.ALL)
    delta = tl.where(rho < tl.load(gate), below, tl.load(gate + 3) + tl.load(gate + 4) * rho)
    return tl.where(tl.abs(delta) < float("inf"), delta, 0.0)  # not finite: left alone


@triton.jit
def _count(counts: tl.tensor, sums: tl.tensor, axis: tl.tensor, rho: tl.tensor, delta: tl.tensor, BINS: tl.constexpr) -> None:
    """One token seen by one direction, whose counters these are; orders between programs do not matter."""
    place = (rho - tl.load(axis)) * tl.load(axis + 1)
    place = tl.where(place == place, place, 0.0)  # NaN is counted in the first bin
    bin = tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(tl.int32)
    one = tl.full((), 1, tl.int64)
    tl.atomic_add(counts, one, sem="relaxed")
    tl.atomic_add(counts + 2 + bin, one, sem="relaxed")
    if delta != 0:
        size = tl.abs(delta).to(tl.float64)
        tl.atomic_add(counts + 1, one, sem="relaxed")
        tl.atomic_add(sums, size, sem="relaxed")
        tl.atomic_max(sums + 1, size, sem="relaxed")
