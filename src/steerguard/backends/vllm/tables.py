"""The static buffers that the op in the graph reads: which configuration each token has, and what that does at each layer.

A *row* is one configuration of gates over all layers; row 0 moves nothing. A *slot* is the row of one token. Buffers are
laid out once, before the engine compiles or captures anything, and are only ever written in place; so what a request
gets is data, never code. Rows are kept as long as there is room, and a batch whose rows are there writes slots alone.

This module knows gates, directions and tensors. It knows no requests and nothing of vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerguard.errors import InputError
from steerguard.guard import Guard
from steerguard.probe import Probe
from steerguard.rules import SHUT

BINS = 64
"""Bins of a projection histogram; the first and the last are open."""
SPAN = 4.0
"""The histogram reaches from m - SPAN * delta_mu to m + SPAN * delta_mu."""

Stage = tuple[Guard, bool]
"""A guard, and whether it acts; one that does not only looks."""
_Key = tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True, eq=False)
class LayerTables:
    """What the op of one layer reads and writes. S rows, K stages, D directions, T tokens, d width."""

    v: Tensor
    "[D, d] float32 unit directions"
    direction: Tensor
    "[S, K] int32 which direction a row's k-th stage acts along; -1: no stage"
    gates: Tensor
    "[S, K, 6] float32"
    axis: Tensor
    "[D, 2] float32: where a direction's histogram begins, and bins per unit of projection"
    counts: Tensor
    "[D, 2 + BINS] int64: tokens seen, tokens moved, histogram of rho before correction"
    sums: Tensor
    "[D, 2] float64: sum of |delta|, largest |delta|"
    rho: Tensor
    "[K, T] float32 projection before correction, of the last forward"
    delta: Tensor
    "[K, T] float32 shift, of the last forward"
    kept: Tensor | None
    "[T, d] residuals after correction, of the last forward, in the model's dtype; None unless residuals may be read"

    @classmethod
    def empty(
        cls, *, rows: int, stages: int, directions: int, tokens: int, width: int, device: Any, dtype: Any, keep: bool
    ) -> LayerTables:
        def zeros(*shape: int, dtype: Any = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        gates = torch.from_numpy(SHUT.row()).to(device).expand(rows, stages, 6).contiguous()
        direction = torch.full((rows, stages), -1, dtype=torch.int32, device=device)
        return cls(
            v=zeros(directions, width), direction=direction, gates=gates, axis=zeros(directions, 2),
            counts=zeros(directions, 2 + BINS, dtype=torch.int64), sums=zeros(directions, 2, dtype=torch.float64),
            rho=zeros(stages, tokens), delta=zeros(stages, tokens), kept=zeros(tokens, width, dtype=dtype) if keep else None,
        )  # fmt: skip

    @cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """On a CPU: the same memory as arrays, in the order of the fields, without what is kept."""
        tensors = (self.v, self.direction, self.gates, self.axis, self.counts, self.sums, self.rho, self.delta)
        return tuple(one.numpy() for one in tensors)


class Tables:
    """The buffers of every open layer, and which row each configuration has.

    Args:
        layers: the open layers.
        rows: configurations that can be held at once, the shut one included.
        directions: guards that can be held on one layer.
        tokens: the most tokens of one forward.
        keep: whether residuals may be read.
    """

    def __init__(
        self, layers: Sequence[int], *, rows: int, stages: int, directions: int, tokens: int, width: int, device: Any,
        dtype: Any, keep: bool = False,
    ) -> None:  # fmt: skip
        # one more of each than is given out: the last ones are the canary's, whose stages are two
        rows, directions, stages = rows + 1, directions + 1, max(stages, 2)
        self.stages, self.device, self.dtype = stages, device, dtype
        self.layers = {
            layer: LayerTables.empty(
                rows=rows, stages=stages, directions=directions, tokens=tokens, width=width, device=device, dtype=dtype, keep=keep
            )
            for layer in layers
        }
        self.slots = torch.zeros(tokens, dtype=torch.int32, device=device)
        "[T] the row of each token of the forward in progress"
        self.idle = True
        "whether every slot is 0: then a host that runs the op itself need not look"
        self._filled = 0
        self._rows: OrderedDict[_Key, tuple[int, tuple[Stage, ...]]] = OrderedDict()
        self._free_rows = list(range(rows - 2, 0, -1))
        self._directions: dict[tuple[str, int], int] = {}
        self._free_directions = {layer: list(range(directions - 2, -1, -1)) for layer in self.layers}
        self._seen = np.zeros(rows, np.int64)
        self._expected: dict[tuple[str, int], int] = {}

    # ---------------------------------------------------------------------------------------- guards

    def add(self, guard: Guard) -> None:
        """Make room for a guard on each of its layers; all or nothing. Raises InputError."""
        closed = [layer for layer in guard.layers if layer not in self.layers]
        if closed:
            raise InputError(
                f"guard {guard.name!r} steers layers {closed}, and this engine has open layers {sorted(self.layers)}; start it "
                f'with "layers": {sorted({*self.layers, *closed})}'
            )
        full = [layer for layer in guard.layers if not self._free_directions[layer]]
        if full:
            raise InputError(f"there is no room for another guard on layers {full}; remove one, or start with a larger `spare`")
        for probe in guard.probes:
            self._place(guard.name, probe)

    def _place(self, name: str, probe: Probe) -> None:
        table, key = self.layers[probe.layer], (name, probe.layer)
        at = self._free_directions[probe.layer].pop()
        low, width = probe.m - SPAN * probe.delta_mu, 2 * SPAN * probe.delta_mu
        table.v[at] = torch.from_numpy(np.array(probe.v, np.float32)).to(self.device)
        table.axis[at] = torch.tensor([low, BINS / width if width > 0 else 0.0], device=self.device)
        table.counts[at] = 0
        table.sums[at] = 0
        self._directions[key], self._expected[key] = at, 0

    def remove(self, name: str) -> None:
        """Forget a guard, and every row that acts along it."""
        for key in [key for key in self._rows if any(name == own for own, _, _ in key)]:
            self._drop(key)
        for own in [own for own in self._directions if own[0] == name]:
            self._free_directions[own[1]].append(self._directions.pop(own))
            del self._expected[own]

    # ------------------------------------------------------------------------------------------ rows

    def row(self, stages: Sequence[Stage], in_use: Iterable[int] = ()) -> int:
        """The row of these guards in this order, written if it is not there; 0 for none.

        Args:
            in_use: rows that the forward in preparation needs and that must stay.
        """
        if not stages:
            return 0
        key = tuple((guard.name, guard.digest, acts) for guard, acts in stages)
        if key not in self._rows:
            at = self._free_row(set(in_use))
            self._write(at, stages)
            self._rows[key] = at, tuple(stages)
        self._rows.move_to_end(key)
        return self._rows[key][0]

    def _free_row(self, in_use: set[int]) -> int:
        if not self._free_rows:
            self._drop(next(key for key, (at, _) in self._rows.items() if at not in in_use))
        return self._free_rows.pop()

    def _drop(self, key: _Key) -> None:
        at, stages = self._rows.pop(key)
        self._account(at, stages)
        self._free_rows.append(at)

    def _write(self, at: int, stages: Sequence[Stage]) -> None:
        """Write a row on every layer: a few small copies, in the order of the stream that runs the forwards."""
        gates = {layer: np.tile(SHUT.row(), (self.stages, 1)) for layer in self.layers}
        direction = {layer: np.full(self.stages, -1, np.int32) for layer in self.layers}
        used = dict.fromkeys(self.layers, 0)
        for guard, acts in stages:
            for probe, gate in guard.gates():
                layer, k = probe.layer, used[probe.layer]
                direction[layer][k] = self._directions[guard.name, layer]
                gates[layer][k] = gate.row() if acts else SHUT.row()
                used[layer] += 1
        for layer, table in self.layers.items():
            table.gates[at] = torch.from_numpy(gates[layer]).to(self.device)
            table.direction[at] = torch.from_numpy(direction[layer]).to(self.device)

    # ----------------------------------------------------------------------------------------- slots

    def fill(self, rows: np.ndarray[Any, Any]) -> None:
        """Set the rows `[tokens]` of the forward to come; whatever stands after them (padding) has row 0."""
        count = len(rows)
        idle = not rows.any()
        if idle and self.idle:
            return
        self._seen += np.bincount(rows, minlength=len(self._seen))
        end = max(count, self._filled)
        # on a GPU a new pinned buffer each time: torch lends it again only when the copy from it has run
        host = torch.empty(end, dtype=torch.int32, pin_memory=True) if self.slots.is_cuda else self.slots[:end]
        on_host = host.numpy()
        on_host[:count] = rows
        on_host[count:] = 0
        if self.slots.is_cuda:
            self.slots[:end].copy_(host, non_blocking=True)
        self._filled, self.idle = (0, True) if idle else (count, False)

    def clear(self, uncounted: int = 0) -> None:
        """Row 0 for every token; what was seen under the row `uncounted` is nobody's."""
        self.fill(np.zeros(0, np.int64))
        self._seen[uncounted] = 0

    # -------------------------------------------------------------------------------------- counters

    def _account(self, at: int, stages: Sequence[Stage]) -> None:
        """Add what a row's tokens should have been seen by to the guards' accounts."""
        for guard, _ in stages:
            for layer in guard.layers:
                self._expected[guard.name, layer] += int(self._seen[at])
        self._seen[at] = 0

    def counters(self) -> list[Mapping[str, Any]]:
        """What each guard saw and did at each layer since it was added; waits for the device."""
        for at, stages in self._rows.values():
            self._account(at, stages)
        read = {layer: (table.counts.tolist(), table.sums.tolist()) for layer, table in self.layers.items()}
        found: list[Mapping[str, Any]] = []
        for (name, layer), at in self._directions.items():
            counts, sums = read[layer][0][at], read[layer][1][at]
            low, scale = self.layers[layer].axis[at].tolist()
            found.append({
                "guard": name, "layer": layer, "seen": counts[0], "moved": counts[1], "expected": self._expected[name, layer],
                "mean_shift": sums[0] / counts[1] if counts[1] else 0.0, "largest_shift": sums[1],
                "histogram": counts[2:], "low": low, "bins_per_unit": scale,
            })  # fmt: skip
        return found
