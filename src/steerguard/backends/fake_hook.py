"""What stands between two blocks of the fake: the gates of one row, and every way in which they can go wrong.

`Hook` is right. `FaultyHook` is wrong in one chosen way (`Fault`), below everything that could notice: it is there so
that checks can be seen to fail, steerguard's own and those that users write around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from steerguard.backends.base import Floats
from steerguard.guard import Guard, Positions
from steerguard.rules import INF, correct, shift

LATE_AFTER = 16
"""Forwards of one generation after which `Fault.LATE` stops firing."""


class Fault(StrEnum):
    """A way to steer wrongly that has been seen in the field. `load(folder, fault=Fault.HALF_SHIFT)`.

    The proof on entering `guarded` sees each of them, except NOT_UNDONE (on leaving) and LATE (at the end of the
    generation, where the backend counts the tokens that its gates looked at).
    """

    NEVER_FIRES = "never-fires"
    "the hook is installed and never called"
    THROWN_AWAY = "thrown-away"
    "the hook is called and reports what it did; the model goes on with the residual of before"
    WRONG_LAYER = "wrong-layer"
    "the guard acts one layer later than it should; on the last layer it does not act"
    FIRST_ROW_ONLY = "first-row-only"
    "only row 0 of a batch is steered"
    HALF_SHIFT = "half-shift"
    "the projection moves by half of delta"
    PROMPT_ONLY = "prompt-only"
    "only the first forward of a generation is steered: decoded tokens are missed"
    RELATIVE_POSITIONS = "relative-positions"
    "positions are counted within each forward: with a cache, `response` guards steer no decoded token"
    SHIFTED_POSITIONS = "shifted-positions"
    "the answer is taken to begin one token early, as when a padding token is counted"
    LEAKS = "leaks"
    "a row's guards also act on the next row of the batch"
    NOT_UNDONE = "not-undone"
    "guards stay installed after `guarded` is left"
    BFLOAT16 = "bfloat16"
    "projection, delta and the moved residual are computed in bfloat16"
    UNGATED = "ungated"
    "the knee is ignored: every token takes the branch that moves tokens"
    REVERSED = "reversed"
    "of several guards on one layer, the last acts first"
    LATE = "late"
    "the hook is no longer called after 16 forwards of a generation"
    SHARED_CACHE = "shared-cache"
    "the cache of a prompt is reused by later calls with the same prompt, whatever their guards"


@dataclass(frozen=True, eq=False)
class Slot:
    """One gate of one guard of a row."""

    guard: int
    "index of the guard in the row's guards"
    layer: int
    v: Floats
    "[d] unit vector"
    gate: Floats
    "[6] as `Gate.row` gives it"
    positions: Positions


def slots(guards: Sequence[Guard]) -> tuple[Slot, ...]:
    """Every gate of a row's guards, in order."""
    return tuple(
        Slot(i, probe.layer, probe.v, gate.row(), guard.positions)
        for i, guard in enumerate(guards)
        for probe, gate in guard.gates()
    )


@dataclass(eq=False)
class Log:
    """What one slot saw and did, by absolute position; NaN where its gate never looked."""

    rho: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    delta: Floats = field(default_factory=lambda: np.empty(0, np.float32))

    def write(self, start: int, rho: Floats, delta: Floats) -> None:
        """Write from position `start` on; what stood there before (without a cache, the same) is replaced."""
        gap = np.full(max(start - len(self.rho), 0), np.nan, np.float32)
        self.rho = np.concatenate([self.rho[:start], gap, rho])
        self.delta = np.concatenate([self.delta[:start], gap, delta])

    def seen(self, start: int) -> int:
        """How many positions from `start` on the gate looked at."""
        return int(np.isfinite(self.delta[start:]).sum())

    @property
    def moved(self) -> int:
        return int((np.isfinite(self.delta) & (self.delta != 0)).sum())


class Hook:
    """The gates of one row. Called with (layer, residual `[tokens, d]`, start) after each block; see `OnBlock`."""

    def __init__(self, own: tuple[Slot, ...], answer_start: int) -> None:
        self.own = own
        self.answer_start = answer_start
        self.logs = {slot: Log() for slot in own}

    def __call__(self, layer: int, h: Floats, start: int) -> Floats:
        for slot in self.acting(layer):
            h = self.act(slot, h, start)
        return h

    def acting(self, layer: int) -> Sequence[Slot]:
        """The slots that act after this block, in order."""
        return [slot for slot in self.own if slot.layer == layer]

    def act(self, slot: Slot, h: Floats, start: int) -> Floats:
        scope = self.scope(slot, start, len(h))
        moved, rho, delta = self.correct(h, slot)
        if slot in self.logs:
            self.logs[slot].write(start, rho, np.where(scope, delta, np.float32(0)))
        return np.where(scope[:, None], moved, h)

    def scope(self, slot: Slot, start: int, n: int) -> npt.NDArray[np.bool_]:
        """Which of the `n` tokens from position `start` on the slot's guard names."""
        return np.arange(start, start + n) >= self.first(slot)

    def first(self, slot: Slot) -> int:
        """The first position that the slot's guard names."""
        return 0 if slot.positions == "all" else self.answer_start

    def correct(self, h: Floats, slot: Slot) -> tuple[Floats, Floats, Floats]:
        moved, rho, delta = correct(h, slot.v, slot.gate)
        return moved, rho, delta

    @property
    def seen(self) -> int:
        """Token-gate pairs looked at."""
        return sum(log.seen(self.first(slot)) for slot, log in self.logs.items())

    @property
    def shift(self) -> float:
        """Sum of |delta| over the token-gate pairs."""
        return float(sum(np.nansum(np.abs(log.delta), dtype=np.float64) for log in self.logs.values()))

    @property
    def moved(self) -> int:
        """Token-gate pairs moved."""
        return sum(log.moved for log in self.logs.values())


class FaultyHook(Hook):
    """A hook with one fault. `row` is its number in the batch, `neighbours` the slots of the row before it."""

    def __init__(self, own: tuple[Slot, ...], answer_start: int, *, fault: Fault, row: int, neighbours: tuple[Slot, ...]) -> None:
        super().__init__(own, answer_start)
        self.fault, self.row, self.neighbours = fault, row, neighbours
        self.forwards = 0

    def __call__(self, layer: int, h: Floats, start: int) -> Floats:
        self.forwards += layer == 0
        steered = super().__call__(layer, h, start)
        return h if self.fault is Fault.THROWN_AWAY else steered

    def acting(self, layer: int) -> Sequence[Slot]:
        match self.fault:
            case Fault.NEVER_FIRES:
                return ()
            case Fault.WRONG_LAYER:
                return super().acting(layer - 1)
            case Fault.FIRST_ROW_ONLY if self.row > 0:
                return ()
            case Fault.PROMPT_ONLY if self.forwards > 1:
                return ()
            case Fault.LATE if self.forwards > LATE_AFTER:
                return ()
            case Fault.LEAKS:
                return [*super().acting(layer), *(slot for slot in self.neighbours if slot.layer == layer)]
            case Fault.REVERSED:
                return super().acting(layer)[::-1]
        return super().acting(layer)

    def scope(self, slot: Slot, start: int, n: int) -> npt.NDArray[np.bool_]:
        if self.fault is Fault.RELATIVE_POSITIONS:
            start = 0
        if self.fault is Fault.SHIFTED_POSITIONS:
            start += 1
        return super().scope(slot, start, n)

    def correct(self, h: Floats, slot: Slot) -> tuple[Floats, Floats, Floats]:
        if self.fault is Fault.BFLOAT16:
            rho = to_bfloat16((to_bfloat16(h) * to_bfloat16(slot.v)).sum(-1))
            delta = to_bfloat16(shift(np, rho, slot.gate))
            moved = to_bfloat16(to_bfloat16(h) + delta[:, None] * to_bfloat16(slot.v))
            return np.where((delta != 0)[:, None], moved, h), rho, delta
        if self.fault is Fault.UNGATED:
            slot = replace(slot, gate=_without_knee(slot.gate))
        moved, rho, delta = correct(h, slot.v, slot.gate)
        if self.fault is Fault.HALF_SHIFT:
            moved, delta = h + delta[:, None] / 2 * slot.v, delta / 2
        return moved, rho, delta


def _without_knee(gate: Floats) -> Floats:
    """The same gate with every token on the branch that moves tokens."""
    knee, below_a, below_b, *_ = gate
    moves_below = knee > -INF and (below_a != 0 or below_b != 0)
    return np.concatenate([np.array([INF if moves_below else -INF], np.float32), gate[1:]])


def to_bfloat16(x: Floats) -> Floats:
    """float32 rounded to the nearest bfloat16, ties to even, kept as float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)
