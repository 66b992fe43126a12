"""Proof at start: that the op stands in the path that really runs, moves what it should, and nothing when shut.

Canary gates are written through the same tables as a request's, and a dummy forward goes through the engine's own
compiled code and CUDA graphs, on every rank. For each open layer, one after the other:

  shut     a live gate that no token reaches: the op looked at every token, moved none, and what the model puts out is
           bit for bit (on devices that repeat themselves) what it is without
  rewrite  a gate that moves by less than a rounding: every token's residual is written anew, and is what it was. What
           the model puts out is unchanged only if the next block reads the sum of what was written
  push     a gate that moves every token by the length of its residual: the op moved every token by that much, and what
           the model puts out changed

What a push does is measured by a second stage behind it, which looks and does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerguard.backends.vllm.tables import Tables
from steerguard.errors import NotSteering
from steerguard.rules import INF, Gate

Forward = Callable[[int], Tensor | None]
"""Run a dummy forward of so many tokens through the engine's own path; what the model puts out [tokens, d], if anything."""


@dataclass(frozen=True)
class Seen:
    """What the op of one layer recorded of one forward."""

    out: Tensor | None
    rho: Tensor
    "[tokens] before correction"
    delta: Tensor
    after: Tensor
    "[tokens] projection that a second stage saw"


def prove(tables: Tables, layers: Sequence[int], forward: Forward, sizes: Sequence[int]) -> list[str]:
    """Prove every open layer of this rank at these numbers of tokens. Returns a line for each; raises NotSteering."""
    told = []
    for size in sizes:
        with torch.no_grad():
            plain, again = _out(forward(size)), _out(forward(size))
            noise = 0.0 if plain is None or again is None else _apart(again, plain)
            told += [_layer(tables, layer, forward, size, plain, noise) for layer in layers]
    return told


def _layer(tables: Tables, layer: int, forward: Forward, size: int, plain: Tensor | None, noise: float) -> str:
    where = f"layer {layer}, {size} tokens"
    v = _direction(tables, layer)
    # 1. shut
    shut = _run(tables, layer, forward, size, Gate(-1e30, 0.0, 1.0, 0.0, 0.0, INF), v)
    if not bool((shut.delta == 0).all()):
        raise NotSteering(f"{where}: a shut gate moved tokens")
    _same(shut.out, plain, 8 * noise, f"{where}: a shut gate changed what the model puts out")
    if not bool(torch.isfinite(shut.rho).all()):
        raise NotSteering(f"{where}: the projections are not finite")
    # 2. rewrite
    length = float(shut.rho.abs().median()) or 1.0
    tiny = Gate(-INF, 0.0, 0.0, max(length, 1e-3) * 1e-12, 0.0, INF)
    rewritten = _run(tables, layer, forward, size, tiny, v)
    if bool((rewritten.delta == 0).any()):
        raise NotSteering(f"{where}: tokens were left alone that a gate should have rewritten")
    allowed = 8 * noise + _rounding(tables)
    _same(rewritten.out, plain, allowed, f"{where}: the next block does not read the sum of what the op wrote")
    # 3. push
    push = max(length, 1e-2) * 16
    pushed = _run(tables, layer, forward, size, Gate(-INF, 0.0, 0.0, push, 0.0, INF), v)
    moved = pushed.after - pushed.rho
    allowed = push * 0.02 + 1e-3
    if not bool(((moved - push).abs() <= allowed).all()):
        raise NotSteering(
            f"{where}: a push of {push:.4g} was due, {float(moved.min()):.4g} to {float(moved.max()):.4g} were measured"
        )
    if pushed.out is not None and plain is not None and bool((pushed.out == plain).all()):
        raise NotSteering(f"{where}: every token was pushed and what the model puts out did not change")
    return f"{where}: shut moves nothing, a push of {push:.3g} moves {float(moved.mean()):.3g}"


def _direction(tables: Tables, layer: int) -> Tensor:
    width = tables.layers[layer].v.shape[1]
    v = np.random.default_rng(layer).normal(size=width)
    return torch.from_numpy((v / np.linalg.norm(v)).astype(np.float32)).to(tables.device)


def _run(tables: Tables, layer: int, forward: Forward, size: int, gate: Gate, v: Tensor) -> Seen:
    """One forward with this gate at this layer alone, in the last row and along the last direction of its tables."""
    table = tables.layers[layer]
    row, along = len(table.gates) - 1, len(table.v) - 1
    before = table.v[along].clone(), table.counts[along].clone(), table.sums[along].clone()
    watch = torch.from_numpy(np.stack([gate.row(), Gate(-INF, 0.0, 0.0, 0.0, 0.0, INF).row()])).to(tables.device)
    saved = table.gates[row].clone(), table.direction[row].clone()
    table.v[along], table.gates[row, :2], table.direction[row, :2] = v, watch, along
    table.rho.fill_(torch.nan)
    tables.fill(np.full(size, row))
    try:
        out = _out(forward(size))
        seen = Seen(out, *(x[:size].cpu().clone() for x in (table.rho[0], table.delta[0], table.rho[1])))
        counted = int(table.counts[along, 0] - before[1][0])
    finally:
        tables.clear(row)
        table.gates[row], table.direction[row] = saved
        table.v[along], table.counts[along], table.sums[along] = before
    if counted != 2 * size or not bool(torch.isfinite(seen.rho).all()):
        raise NotSteering(
            f"layer {layer}: the op looked {counted} times at {size} tokens, {2 * size} were due; it does not stand in the "
            "path that runs. Clear vLLM's compile cache, and start again"
        )
    return seen


def _out(out: Tensor | None) -> Tensor | None:
    return None if out is None else out.float().cpu()


def _same(out: Tensor | None, plain: Tensor | None, tolerance: float, what: str) -> None:
    if out is not None and plain is not None and not (off := _apart(out, plain)) <= tolerance:
        raise NotSteering(f"{what} (by {off:.2g} of its length, allowed {tolerance:.2g})")


def _apart(out: Tensor, plain: Tensor) -> float:
    """Length of the difference relative to the length."""
    return float((out - plain).norm() / plain.norm().clamp(min=1e-30))


def _rounding(tables: Tables) -> float:
    """What adding a pair in one place rather than in the next block may change; a lost half would change all of it."""
    return 1e-3 if tables.dtype == torch.float32 else 0.1
