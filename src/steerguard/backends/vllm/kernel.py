"""The kernel on any device: the gates of a batch whose tokens have configurations of their own.

It is `rules.correct` for a table of rows: the same projection, the same shift, the same bits where nothing moves. The
residual comes as what a vLLM block returns: the sum of a pair (hidden, residual), or one tensor. Where a token moves,
its whole new residual is written to one half and 0 to the other, so that their sum is exactly what `correct` says.

`kernel_triton` does the same in one pass on a GPU, and `kernel_loop` on a CPU; this one is their reference, and what runs
where neither fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerguard.backends.vllm.tables import BINS, LayerTables
from steerguard.rules import shift


def steer(hidden: Tensor, residual: Tensor | None, slots: Tensor, table: LayerTables) -> None:
    """Correct the residual hidden (+ residual) of every token in place.

    Args:
        hidden: [T, d] what a block returned.
        residual: [T, d] the other half of the pair; None where a block returns one tensor.
        slots: [T] int32 row of each token; 0 for tokens that nothing acts on.
        table: of this layer; its counters and records are written.
    """
    tokens = len(hidden)
    at = slots[:tokens].nonzero()[:, 0]
    if len(at) == 0:
        return
    everywhere = len(at) == tokens
    rows = slots[:tokens].long() if everywhere else slots[at].long()
    # 1. the residual as the next block would read it, in the model's own dtype
    here = hidden if everywhere else hidden[at]
    h = here if residual is None else here + (residual if everywhere else residual[at])
    touched = torch.zeros(len(rows), dtype=torch.bool, device=h.device)
    # 2. stage by stage: each sees what the one before left
    for k in range(table.direction.shape[1]):
        along = table.direction[rows, k].long()
        acts = along >= 0
        if not acts.any():
            break
        v = _directions(table.v, along, acts)
        h32 = h.float()
        rho = (h32 * v).sum(-1)
        delta = torch.where(acts, shift(torch, rho, table.gates[rows, k]), 0.0)
        moves = delta != 0
        h = torch.where(moves[:, None], (h32 + delta[:, None] * v).to(h.dtype), h)
        touched |= moves
        table.rho[k, at], table.delta[k, at] = rho, delta
        _count(table, along[acts], rho[acts], delta[acts])
    # 3. write what moved; the other half becomes 0, so that the sum is exactly h
    moved = touched.nonzero()[:, 0]
    if len(moved):
        to = moved if everywhere else at[moved]
        if residual is None:
            hidden[to] = h[moved]
        else:
            hidden[to] = 0
            residual[to] = h[moved]


def keep(hidden: Tensor, residual: Tensor | None, table: LayerTables) -> None:
    """Keep the residual of every token, if this table keeps any."""
    if table.kept is not None:
        table.kept[: len(hidden)] = hidden if residual is None else hidden + residual


def _directions(v: Tensor, along: Tensor, acts: Tensor) -> Tensor:
    """[T, d], or [d] if all tokens act along the same direction."""
    first = along[acts][0]
    return v[first] if bool((along[acts] == first).all()) else v[along.clamp(min=0)]


def _count(table: LayerTables, along: Tensor, rho: Tensor, delta: Tensor) -> None:
    size = delta.abs().double()
    low, scale = table.axis[along].unbind(-1)
    bins = ((rho - low) * scale).nan_to_num(0.0).clamp(0, BINS - 1).long()
    columns = table.counts.shape[1]
    flat = table.counts.view(-1)
    one = torch.ones_like(along)
    flat.index_add_(0, along * columns, one)
    flat.index_add_(0, along * columns + 1, (delta != 0).long())
    flat.index_add_(0, along * columns + 2 + bins, one)
    table.sums[:, 0].index_add_(0, along, size)
    table.sums[:, 1].scatter_reduce_(0, along, size, "amax")
