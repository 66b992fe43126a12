"""The kernel inside a forward is the reference, bit for bit, on both of its paths; and it counts what it moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from steerguard.backends.hf_kernel import Kernel, OnDevice, OnHost, kernel
from steerguard.rules import INF, RULES, SHUT, Gate, correct, rule
from tiny import probe

ROWS, TOKENS, D = 5, 7, 16
PROBE = probe(0, D)
GATES = {
    **{name: (rule(name, cls.grid[-1]) if cls.grid else rule(name)).compile(PROBE) for name, cls in RULES.items()},
    "shut": SHUT,
    "both branches": Gate(0.1, 1.3, -0.7, -0.4, 0.3, 1.0),
    "overflows": Gate(INF, 3e38, 3e38, 0.0, 0.0, INF),
}
MAKERS: dict[str, Callable[..., Kernel]] = {
    "host": OnHost,
    "device": lambda v, gate, rows: OnDevice(v, gate, rows, torch.device("cpu")),
}


def residuals(tokens: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Ordinary ones on both sides of every knee, zeros of both signs, and broken ones."""
    h = torch.randn(ROWS, tokens, D, generator=torch.Generator().manual_seed(seed))
    h[0, 0] = -0.0
    h[1, 0, 3], h[2, 0, 4], h[3, 0, 5] = torch.nan, torch.inf, -torch.inf
    return h.to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Equal bits, so that -0 is not 0; every NaN is one."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).contiguous().view(kind)


def table(gates: list[Gate]) -> tuple[torch.Tensor, torch.Tensor]:
    """A direction and a gate of its own for each row."""
    rng = np.random.default_rng(3)
    v = rng.normal(size=(ROWS, 1, D))
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    rows = np.stack([gates[i % len(gates)].row() for i in range(ROWS)])[:, None]
    return torch.tensor(v, dtype=torch.float32), torch.tensor(rows)


def cases() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    one = torch.tensor(PROBE.v.copy())
    alone = [(name, one, torch.tensor(gate.row())) for name, gate in GATES.items()]
    mixed = [("different rows", *table(list(GATES.values()))), ("one-sided rows", *table([GATES["StTP"], GATES["StMP"], SHUT]))]
    return alone + mixed


@pytest.mark.parametrize("path", MAKERS)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("v", "gate"), [pytest.param(v, gate, id=name) for name, v, gate in cases()])
def test_it_is_the_reference(path: str, tokens: int, dtype: torch.dtype, v: torch.Tensor, gate: torch.Tensor) -> None:
    h = residuals(tokens, dtype)
    before = h.clone()
    moved, rho, delta = MAKERS[path](v, gate, ROWS)(h, None, None)
    expected = correct(before, v, gate)
    assert torch.equal(bits(h), bits(before)), "the block's own output was written to"
    assert moved.dtype == dtype
    assert torch.equal(bits(moved), bits(expected[0]))
    assert torch.equal(bits(rho), bits(expected[1]))
    assert torch.equal(delta, expected[2])


@pytest.mark.parametrize("path", MAKERS)
def test_it_acts_and_counts_where_it_may(path: str) -> None:
    v, gate = table([GATES["StTP"], GATES["both branches"]])
    act = MAKERS[path](v, gate, ROWS)
    where = torch.arange(TOKENS) >= torch.tensor([0, 2, 4, 6, 7])[:, None]
    alive = torch.tensor([True, True, False, True, True])
    moved_due, size_due = np.zeros(ROWS), np.zeros(ROWS)
    for step, allowed in enumerate((where, None)):
        h = residuals(TOKENS if step == 0 else 1, torch.float32, seed=step)
        out, _, delta = act(h, allowed, alive)
        expected, _, due = correct(h, v, gate)
        if allowed is not None:
            expected, due = torch.where(allowed[..., None], expected, h), torch.where(allowed, due, 0.0)
        assert torch.equal(bits(out), bits(expected))
        assert torch.equal(delta, due)
        moved_due += (due != 0).sum(1).numpy() * alive.numpy()
        size_due += due.abs().sum(1).numpy() * alive.numpy()
    moved, size = act.tally()
    assert moved == moved_due.tolist()
    np.testing.assert_allclose(size, size_due, rtol=1e-6)
    assert moved[2] == 0 < sum(moved)  # the row that has ended does not count


def test_what_no_gate_moves_is_handed_back() -> None:
    h = residuals(1, torch.float32)
    out, _, _ = OnHost(torch.tensor(PROBE.v.copy()), torch.tensor(SHUT.row()), ROWS)(h, None, None)
    assert out is h


def test_the_device_decides() -> None:
    v, gate = torch.tensor(PROBE.v.copy()), torch.tensor(SHUT.row())
    assert isinstance(kernel(v, gate, 1, torch.device("cpu")), OnHost)
    assert isinstance(kernel(v, gate, 1, torch.device("meta")), OnDevice)


@pytest.mark.parametrize("path", MAKERS)
def test_the_comparison_can_fail(path: str) -> None:
    """One number of the gate off, and the paths are told apart."""
    h: Any = residuals(TOKENS, torch.float32)
    gate = GATES["StMP"].row()
    other = gate.copy()
    other[2] = np.nextafter(gate[2], np.float32(INF))
    v = torch.tensor(PROBE.v.copy())
    moved, _, _ = MAKERS[path](v, torch.tensor(other), ROWS)(h, None, None)
    assert not torch.equal(bits(moved), bits(correct(h, v, torch.tensor(gate))[0]))
