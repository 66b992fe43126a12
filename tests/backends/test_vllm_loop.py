"""The compiled loop of a CPU does what the portable kernel does, on the batches of `triton_cases`; and is not fooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from triton_cases import DTYPES, Batch, Case, agree, batch, portable, same_bits, says_something

from steerguard.backends.vllm import kernel
from steerguard.rules import shift

pytest.importorskip("numba", reason="Numba is not installed: it comes with vLLM, or pip install numba")
from steerguard.backends.vllm import kernel_loop

CASES = [
    Case(stages, width, dtype, pair)
    for stages, width, dtype, pair in product((1, 3), (48, 1000), ("float32", "bfloat16"), (True, False))
]


def looped(given: Batch) -> None:
    assert kernel_loop.fits(given.hidden, given.residual)
    kernel_loop.steer(given.hidden, given.residual, given.slots, given.table)
    kernel.keep(given.hidden, given.residual, given.table)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_agrees_with_the_portable_kernel(case: Case) -> None:
    before = batch(case)
    ours, theirs = before.clone(), before.clone()
    looped(ours)
    portable(theirs)
    says_something(theirs, before)
    agree(ours, theirs, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.table.gates.zero_(), lambda given: given.table.v.neg_(), lambda given: given.slots.zero_(),
        lambda given: given.slots.copy_(given.slots.roll(1)), lambda given: given.table.direction.clamp_(max=0),
        lambda given: given.hidden.mul_(1.01), lambda given: given.table.counts.add_(1), lambda given: given.table.axis.add_(1),
    ],
    ids=["gates", "v", "slots", "moved slots", "direction", "hidden", "counts", "axis"],
)  # fmt: skip
def test_the_negation(change: Callable[[Batch], Any]) -> None:
    before = batch(Case(2, 256, "float32", pair=True))
    ours, theirs = before.clone(), before.clone()
    change(ours)
    looped(ours)
    portable(theirs)
    with pytest.raises(AssertionError):
        agree(ours, theirs, before)


def test_nothing_to_do_changes_nothing() -> None:
    before = batch(Case(2, 256, "bfloat16", pair=True, keep=False))
    before.slots.zero_()
    after = before.clone()
    looped(after)
    assert after.residual is not None
    looped(replace(after, hidden=after.hidden[:0], residual=after.residual[:0]))
    assert same_bits(after.hidden, before.hidden)
    for field in fields(before.table):
        was = getattr(before.table, field.name)
        assert was is None or torch.equal(getattr(after.table, field.name), was), field.name


def test_its_shift_is_that_of_the_rules() -> None:
    """Bit for bit, infinities and NaN included."""
    special = [0.0, -0.0, 1.5, -2.0, 1e30, -1e30, np.inf, -np.inf, np.nan]
    random = np.random.default_rng(0)
    rho = random.choice(np.array([*special, *random.normal(size=20)], np.float32), 20_000)
    gates = random.choice(np.array([*special, *random.normal(size=20)], np.float32), (20_000, 6))
    with np.errstate(invalid="ignore", over="ignore"):
        due = shift(np, rho, gates)
    got = np.array([kernel_loop._shift(one, gate) for one, gate in zip(rho, gates, strict=True)], np.float32)
    np.testing.assert_array_equal(got, due)
    assert np.count_nonzero(due) > 5000


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    due, got = x.bfloat16(), [kernel_loop._narrowed(one) for one in x.numpy()]
    ours = torch.from_numpy(np.array(got, np.uint16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), due.isnan())
    assert torch.equal(ours.nan_to_num(0.0), due.nan_to_num(0.0))
    back = np.array([kernel_loop._widened(one) for one in ours.view(torch.uint16).numpy()], np.float32)
    np.testing.assert_array_equal(back, ours.float().numpy())


@pytest.mark.parametrize(
    ("hidden", "residual", "fits"),
    [
        (torch.zeros(4, 8), None, True),
        (torch.zeros(4, 8), torch.zeros(4, 8), True),
        (torch.zeros(4, 8, dtype=DTYPES["bfloat16"]), torch.zeros(4, 8, dtype=DTYPES["bfloat16"]), True),
        (torch.zeros(4, 8, dtype=DTYPES["bfloat16"]), torch.zeros(4, 8), False),
        (torch.zeros(4, 8, dtype=DTYPES["float16"]), None, False),
        (torch.zeros(4, 16)[:, :8], None, False),
        (torch.zeros(4, 8), torch.zeros(8, 4).T, False),
    ],
)
def test_what_it_takes(hidden: torch.Tensor, residual: torch.Tensor | None, fits: bool) -> None:
    assert kernel_loop.fits(hidden, residual) is fits
