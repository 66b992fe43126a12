"""The fused kernel against `kernel`, its reference: batches that hold every rule, and what has to be the same.

What runs here runs interpreted on a CPU and compiled on a GPU alike. Triton decides which of the two when it is first
imported, so the interpreted checks have a process of their own: `python triton_cases.py NAME...` runs checks by name
and prints a line of JSON, each name with what went wrong, or null. `--compile` compiles for GPUs that need not be there.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from steerguard.backends.vllm import kernel
from steerguard.backends.vllm.tables import BINS, SPAN, LayerTables
from steerguard.errors import Unsupported
from steerguard.rules import RULES, Rule

DIRECTIONS = 4
WHERE = (-200.0, -1.4, 0.9)
"""Where a row's tokens stand, from m: one that a cap holds, one below, one above; none on the edge of a bin."""
BROKEN = (torch.nan, torch.inf, -torch.inf)
UNWRITTEN = 7.0
"""What the records hold before."""
SEED = 2
"""With this one no token of any case stands on a knee, where a rounding decides; each case checks that."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ----------------------------------------------------------------------------------------------- what is steered


@dataclass(frozen=True)
class Case:
    """One shape of table and batch."""

    stages: int
    width: int
    dtype: str
    pair: bool
    other: str | None = None
    "dtype of the other half, if it is another"
    keep: bool = True

    @property
    def name(self) -> str:
        halves = ("pair" if self.pair else "single") + (f"-with-{self.other}" if self.other else "")
        return f"{self.stages}-{self.width}-{self.dtype}-{halves}" + ("" if self.keep else "-unkept")


@dataclass(frozen=True)
class Statistics:
    """What a rule asks of a probe; the middle of the classes is not the boundary."""

    m: float

    mu_pos = property(lambda self: self.m + 1.5)
    mu_neg = property(lambda self: self.m - 2.5)
    delta_mu = property(lambda self: self.mu_pos - self.mu_neg)
    sigma_pos = sigma_neg = property(lambda self: 0.7)


@dataclass(frozen=True, eq=False)
class Batch:
    """What `steer` is given."""

    hidden: Tensor
    residual: Tensor | None
    slots: Tensor
    table: LayerTables

    def clone(self) -> Batch:
        table: dict[str, Any] = {f.name: _clone(getattr(self.table, f.name)) for f in fields(self.table)}
        hidden = torch.empty_strided(self.hidden.shape, self.hidden.stride(), dtype=self.hidden.dtype, device=self.hidden.device)
        return Batch(hidden.copy_(self.hidden), _clone(self.residual), self.slots.clone(), LayerTables(**table))

    @property
    def acts(self) -> Tensor:
        "[K, T] whether there is a stage"
        return (self.table.direction[self.slots[: len(self.hidden)].long()] >= 0).T

    @property
    def whole(self) -> Tensor:
        "[T, d] the residual"
        return self.hidden if self.residual is None else self.hidden + self.residual


def _clone(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


MOVING = {name: rule for name, rule in RULES.items() if name != "Watch"}
"""The rules that move tokens. Watch compiles to the shut gate, and that is in row 0."""


def strong(rule: type[Rule]) -> Rule:
    """A rule at a strength that moves what it should visibly."""
    return rule(rule.grid[-1]) if rule.grid else rule()  # type: ignore[call-arg]


def batch(case: Case, device: str = "cpu", seed: int = SEED) -> Batch:
    """One row for each rule, with other rules behind it; for each row tokens on both sides, a broken one and one of row 0."""
    random = torch.Generator().manual_seed(seed)
    probes = [Statistics(float(m)) for m in torch.randn(DIRECTIONS, generator=random)]
    rules = [strong(rule) for rule in MOVING.values()]
    tokens = len(rules) * (len(WHERE) + 2)
    order = torch.randperm(tokens, generator=random)
    table = LayerTables.empty(
        rows=len(rules) + 1, stages=case.stages, directions=DIRECTIONS, tokens=tokens + 3, width=case.width, device="cpu",
        dtype=DTYPES[case.dtype], keep=case.keep,
    )  # fmt: skip
    table.v.copy_(torch.nn.functional.normalize(torch.randn(DIRECTIONS, case.width, generator=random)))
    table.rho.fill_(UNWRITTEN)
    table.delta.fill_(UNWRITTEN)
    for at, probe in enumerate(probes):
        width = 2 * SPAN * probe.delta_mu
        table.axis[at] = torch.tensor([probe.m - width / 2, BINS / width])
    slots = torch.zeros(tokens + 3, dtype=torch.int32)
    h = torch.randn(tokens, case.width, generator=random)
    for i in range(len(rules)):
        # 1. the row: from 1 to K stages, its own rule first, each along another direction
        for k in range(case.stages - i % case.stages):
            along = (i + k) % DIRECTIONS
            table.direction[i + 1, k] = along
            table.gates[i + 1, k] = torch.from_numpy(rules[(i + k) % len(rules)].compile(probes[along]).row())
        # 2. its tokens; the last of them stays in row 0
        first, v = i * (len(WHERE) + 2), table.v[i % DIRECTIONS]
        own = order[first : first + len(WHERE) + 1]
        slots[own] = i + 1
        target = torch.tensor([*WHERE, 0.0]) + probes[i % DIRECTIONS].m
        h[own] += (target - h[own] @ v)[:, None] * v
        h[own[-1], int(torch.randint(case.width, (1,), generator=random))] = BROKEN[i % len(BROKEN)]
    return _on(Batch(*_halves(h, case, random), slots, table), device)


def _halves(h: Tensor, case: Case, random: torch.Generator) -> tuple[Tensor, Tensor | None]:
    dtype = DTYPES[case.dtype]
    if not case.pair:
        return h.to(dtype), None
    hidden = torch.randn(h.shape, generator=random).to(dtype)
    return hidden, (h - hidden.float()).to(DTYPES[case.other or case.dtype])


def _on(given: Batch, device: str) -> Batch:
    def to(x: Any) -> Any:
        return None if x is None else x.to(device)

    table = {f.name: to(getattr(given.table, f.name)) for f in fields(given.table)}
    return Batch(to(given.hidden), to(given.residual), to(given.slots), LayerTables(**table))


# --------------------------------------------------------------------------------------------- what is compared


def fused(given: Batch) -> None:
    from steerguard.backends.vllm.kernel_triton import steer

    steer(given.hidden, given.residual, given.slots, given.table)


def portable(given: Batch) -> None:
    kernel.steer(given.hidden, given.residual, given.slots, given.table)
    kernel.keep(given.hidden, given.residual, given.table)


def agree(ours: Batch, theirs: Batch, before: Batch) -> None:
    """Two batches after steering, and what both were before. Raises AssertionError."""
    tokens, acts, table = len(before.hidden), before.acts, ours.table
    eps = torch.finfo(before.whole.dtype).eps
    rho, delta = theirs.table.rho[:, :tokens], theirs.table.delta[:, :tokens]
    # 1. the records: of every stage that there is, and of no other
    slack = max(1e-4, 8 * eps * float(before.whole.float().nan_to_num(0, 0, 0).abs().max() * before.table.v.abs().max()))
    close(table.rho[:, :tokens][acts], rho[acts], 1e-5, slack, "rho")
    close(table.delta[:, :tokens][acts], delta[acts], 1e-5, 10 * slack, "delta")
    for record in (table.rho, table.delta):
        assert (record[:, :tokens][~acts] == UNWRITTEN).all() and (record[:, tokens:] == UNWRITTEN).all()
    # 2. what no gate moves is what it was, bit for bit, and in both halves
    moved = (acts & (delta != 0)).any(0)
    still = ~moved
    for half in ("hidden", "residual") if before.residual is not None else ("hidden",):
        mine, its, was = (getattr(x, half) for x in (ours, theirs, before))
        assert same_bits(mine[still], was[still]), f"{half}: a token that no gate moves was written"
        close(mine[moved], its[moved], 2 * eps, slack, half)
        # rounded where the other one rounds: else a quarter of the elements differ
        assert eps < 1e-4 or (mine[moved] != its[moved]).sum() <= 0.005 * mine[moved].numel(), f"{half}: rounded elsewhere"
    if before.residual is not None:
        assert (ours.hidden[moved] == 0).all()
    # 3. what is kept is what the next block reads
    if table.kept is not None:
        assert theirs.table.kept is not None
        assert same_bits(table.kept[:tokens], ours.whole.to(table.kept.dtype))
        assert same_bits(table.kept[:tokens][still], theirs.table.kept[:tokens][still])
        assert (table.kept[tokens:] == 0).all()
    # 4. the counters
    assert torch.equal(table.counts[:, :2], theirs.table.counts[:, :2]), "seen and moved differ"
    off = (table.counts[:, 2:] - theirs.table.counts[:, 2:]).abs().sum()
    assert off <= 2 * on_an_edge(theirs, acts, 2 * slack), "the histograms differ"
    assert torch.equal(table.counts[:, 2:].sum(1), table.counts[:, 0])
    close(table.sums, theirs.table.sums, 1e-5, 10 * slack * tokens, "sums")


def on_an_edge(given: Batch, acts: Tensor, slack: float) -> Tensor:
    """How many projections stand so close to the edge of a bin that a rounding may put them on the other side."""
    rows = given.slots[: acts.shape[1]].long()
    low, scale = given.table.axis[given.table.direction[rows].T.long().clamp(min=0)].unbind(-1)
    place = (given.table.rho[:, : len(rows)] - low) * scale
    return (acts & (place > -1) & (place < BINS + 1) & ((place - place.round()).abs() < slack * scale)).sum()


def close(mine: Tensor, its: Tensor, rtol: float, atol: float, what: str) -> None:
    torch.testing.assert_close(mine, its, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_int = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


# ------------------------------------------------------------------------------------------------- the checks


def compare(case: Case, device: str) -> None:
    before = batch(case, device)
    ours, theirs = before.clone(), before.clone()
    fused(ours)
    portable(theirs)
    says_something(theirs, before)
    agree(ours, theirs, before)


def says_something(after: Batch, before: Batch) -> None:
    """Every rule moves a token, tokens of a row stay, a broken one always does, and no token stands on a knee."""
    rows = before.slots[: len(before.hidden)].long()
    rho, delta = after.table.rho[:, : len(rows)], after.table.delta[:, : len(rows)]
    for i, name in enumerate(MOVING):
        assert (delta[0, rows == i + 1] != 0).any(), f"{name} moves nothing"
    broken = ~before.whole.isfinite().all(1)
    assert broken.sum() == len(MOVING) and not (delta[:, broken] * before.acts[:, broken]).any()
    assert (before.acts.any(0) & ~broken & ~(before.acts & (delta != 0)).any(0)).any(), "every gate is open"
    knee = before.table.gates[rows, :, 0].T
    apart = (rho - knee).abs()
    assert (apart[before.acts & apart.isfinite()] > 0.02).all(), "a token stands on a knee"


def sabotaged(change: Callable[[Batch], Any]) -> Callable[[str], None]:
    """The comparison must not pass if the fused kernel gets something else."""

    def check(device: str) -> None:
        before = batch(Case(2, 256, "float32", pair=True), device)
        ours, theirs = before.clone(), before.clone()
        change(ours)
        fused(ours)
        portable(theirs)
        try:
            agree(ours, theirs, before)
        except AssertionError:
            return
        raise AssertionError("sabotage was not noticed")

    return check


def nothing_to_do(device: str) -> None:
    """Slot 0 everywhere: not a bit of anything changes; no token at all: no launch."""
    before = batch(Case(2, 256, "bfloat16", pair=True, keep=False), device)
    before.slots.zero_()
    after = before.clone()
    fused(after)
    fused(replace(after, hidden=after.hidden[:0], residual=after.residual[:0] if after.residual is not None else None))
    assert same_bits(after.hidden, before.hidden)
    for field in fields(before.table):
        was = getattr(before.table, field.name)
        assert was is None or torch.equal(getattr(after.table, field.name), was), field.name


def unkept_on_demand(device: str) -> None:
    """A table that keeps residuals, and a call that does not."""
    from steerguard.backends.vllm.kernel_triton import steer

    given = batch(Case(1, 48, "float32", pair=False), device)
    steer(given.hidden, None, given.slots, given.table, keep=False)
    assert given.table.kept is not None and not given.table.kept.any()
    assert given.table.counts[:, 1].any()


def strided(device: str) -> None:
    """Rows that stand apart, as a slice of something wider."""
    given = batch(Case(2, 256, "bfloat16", pair=True), device)
    before = replace(given, hidden=torch.cat([given.hidden] * 2, 1)[:, :256])
    assert before.hidden.stride(0) == 512
    ours, theirs = before.clone(), before.clone()
    assert ours.hidden.stride(0) == 512
    fused(ours)
    portable(theirs)
    agree(ours, theirs, before)


def counts_add_up(device: str) -> None:
    """Counters go on from what they were; the largest shift stays the largest."""
    once, twice = (batch(Case(2, 256, "float32", pair=True), device) for _ in range(2))
    fused(once)
    for _ in range(2):
        fused(replace(twice, hidden=twice.hidden.clone(), residual=_clone(twice.residual)))
    assert torch.equal(twice.table.counts, 2 * once.table.counts)
    torch.testing.assert_close(twice.table.sums, once.table.sums * torch.tensor([2.0, 1.0], device=device).double())


def alone_or_in_company(device: str) -> None:
    """A token's bits do not depend on what else is in the batch."""
    before = batch(Case(2, 1000, "bfloat16", pair=True), device)
    whole = before.clone()
    fused(whole)
    assert whole.residual is not None and before.residual is not None
    for t in range(0, len(before.hidden), 5):
        hidden, residual = before.hidden[t : t + 1].clone(), before.residual[t : t + 1].clone()
        fused(Batch(hidden, residual, before.slots[t : t + 1].clone(), before.table))
        assert same_bits(hidden, whole.hidden[t : t + 1]) and same_bits(residual, whole.residual[t : t + 1])


def refused(device: str) -> None:
    """What the kernel would read wrongly is refused, and nothing is written."""
    good = batch(Case(1, 48, "float32", pair=True), device)
    assert good.residual is not None
    wrong = {
        "columns that stand apart": replace(good, hidden=torch.cat([good.hidden] * 2, 1)[:, ::2]),
        "another width": replace(good, hidden=good.hidden[:, :40], residual=good.residual[:, :40]),
        "halves that differ": replace(good, residual=good.residual[:-1]),
        "too few slots": replace(good, slots=good.slots[:5]),
    }
    for what, given in wrong.items():
        try:
            fused(given)
        except Unsupported:
            continue
        raise AssertionError(f"{what}: not refused")
    assert not good.table.counts.any()


CASES = [
    *(Case(*shape) for shape in product((1, 2, 3), (48, 256, 1000, 5120), DTYPES, (True, False))),
    Case(2, 256, "bfloat16", pair=True, keep=False),
    Case(2, 256, "bfloat16", pair=False, keep=False),
    Case(2, 256, "bfloat16", pair=True, other="float32"),
    Case(2, 256, "float16", pair=True, other="float32"),
]
CHECKS: dict[str, Callable[[str], None]] = {
    **{case.name: partial(compare, case) for case in CASES},
    "nothing to do": nothing_to_do,
    "unkept on demand": unkept_on_demand,
    "strided": strided,
    "counts add up": counts_add_up,
    "alone or in company": alone_or_in_company,
    "refused": refused,
    "sabotage: gates zeroed": sabotaged(lambda given: given.table.gates.zero_()),
    "sabotage: no directions": sabotaged(lambda given: given.table.direction.fill_(-1)),
    "sabotage: directions exchanged": sabotaged(lambda given: given.table.v.copy_(given.table.v.flip(0))),
    "sabotage: caps lost": sabotaged(lambda given: given.table.gates[..., 5].fill_(torch.inf)),
    "sabotage: a stage lost": sabotaged(lambda given: given.table.direction[:, 1].fill_(-1)),
    "sabotage: slots cleared": sabotaged(lambda given: given.slots.zero_()),
    "sabotage: histogram shifted": sabotaged(lambda given: given.table.axis[:, 0].add_(2.0)),
}
"""Every check by name, given the device."""


# ------------------------------------------------------------------------------------- a process of their own


def mend_bfloat16() -> None:
    """Make the interpreter round float32 to bfloat16 as the hardware does, to nearest even; it cuts the bits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert


def run(names: list[str]) -> dict[str, str | None]:
    mend_bfloat16()
    outcomes: dict[str, str | None] = {}
    for name in names:
        try:
            CHECKS[name]("cpu")
            outcomes[name] = None
        except Exception:  # noqa: BLE001  whatever it is, the test of that name shows it
            outcomes[name] = traceback.format_exc()
    return outcomes


# ------------------------------------------------------------------------------------------------- compilation

VARIANTS = {
    f"sm_{chip}, {width} {dtype}, {'pair' if pair else 'single'}{', kept' if keep else ''}": (chip, width, dtype, pair, keep)
    for chip, width, dtype, pair, keep in (
        (90, 5120, "bf16", True, False), (90, 8192, "bf16", True, True), (90, 1000, "fp16", False, False),
        (80, 5120, "bf16", False, True), (80, 8192, "fp32", True, False), (100, 5120, "bf16", True, False),
    )
}  # fmt: skip


def compiled(chip: int, width: int, dtype: str, pair: bool, keep: bool) -> Any:
    """The kernel compiled for an NVIDIA chip that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from steerguard.backends.vllm.kernel_triton import _steer, launch

    block, warps = launch(width)
    constants: dict[str, Any] = {"WIDTH": width, "STAGES": 4, "BINS": BINS, "BLOCK": block}
    constants |= ({} if pair else {"residual": None}) | ({} if keep else {"kept": None})
    types = {"slots": "*i32", "direction": "*i32", "counts": "*i64", "sums": "*fp64"}
    types |= dict.fromkeys(("v", "gates", "axis", "rhos", "deltas"), "*fp32")
    types |= dict.fromkeys(("hidden_row", "residual_row", "record_row"), "i32")
    names = _steer.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(_steer, signature, {(names.index(name),): x for name, x in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def compile_all() -> dict[str, str]:
    """The assembly of every variant."""
    return {name: compiled(*variant).asm["ptx"] for name, variant in VARIANTS.items()}


if __name__ == "__main__":
    print(json.dumps(compile_all() if sys.argv[1:] == ["--compile"] else run(sys.argv[1:] or list(CHECKS))))  # noqa: T201
