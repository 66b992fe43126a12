"""The portable kernel against the reference, token by token, and the tables it reads; no engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import tiny
from steerguard.backends.vllm.kernel import keep, steer
from steerguard.backends.vllm.tables import BINS, Tables
from steerguard.errors import InputError
from steerguard.guard import Guard, ModelIdentity
from steerguard.rules import RULES, StTP, SwFC, correct, rule

WIDTH = 40
IDENTITY = ModelIdentity("tiny", "LlamaForCausalLM", WIDTH, 4, {"w": "0" * 64}, "t", "c")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def guards(layer: int = 1) -> list[Guard]:
    """One of each rule, along directions of their own."""
    return [
        tiny.guard(
            IDENTITY, rule(name, cls.grid[1] if cls.grid else None), (tiny.probe(layer, WIDTH, seed=i),), name=f"guard{i}"
        )
        for i, (name, cls) in enumerate(RULES.items())
    ]


def tables(dtype: torch.dtype = torch.float32, *, layers: Sequence[int] = (1,), rows: int = 32, keep: bool = False) -> Tables:
    made = Tables(
        layers, rows=rows, stages=3, directions=16, tokens=64, width=WIDTH, device="cpu", dtype=dtype, keep=keep
    )
    for guard in guards(layers[0]):
        made.add(guard)
    return made


def residual(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair (hidden, residual) [tokens, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, other = torch.randn(2, tokens, WIDTH, generator=generator) * 2
    return hidden.to(dtype), other.to(dtype)


def reference(h: torch.Tensor, acting: Sequence[Guard]) -> torch.Tensor:
    """One token's residual [d] after guards, one by one."""
    for guard in acting:
        ((probe, gate),) = guard.gates()
        h = correct(h[None], torch.from_numpy(probe.v.copy()), torch.from_numpy(gate.row()))[0][0]
    return h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("single", [False, True], ids=["pair", "single"])
def test_every_token_gets_its_own_configuration(dtype: torch.dtype, single: bool) -> None:
    made, every = tables(dtype), guards()
    choices: list[list[Guard]] = [[], [every[2], every[0]], [every[3], every[4], every[1]], *([guard] for guard in every)]
    acting = [choices[i % len(choices)] for i in range(48)]
    made.fill(np.array([made.row([(guard, True) for guard in some]) for some in acting]))
    hidden, other = residual(48, dtype)
    whole = hidden.clone() if single else hidden + other
    before = hidden.clone(), other.clone()
    steer(hidden, None if single else other, made.slots, made.layers[1])
    after = hidden if single else hidden + other
    moved = 0
    for i, some in enumerate(acting):
        due = reference(whole[i], some)
        torch.testing.assert_close(after[i].float(), due.float(), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
        if torch.equal(due, whole[i]):
            assert torch.equal(hidden[i], before[0][i]), "what no gate moves is left bit for bit"
            assert torch.equal(other[i], before[1][i])
        moved += not torch.equal(due, whole[i])
    assert 10 < moved < 48


def test_the_sum_of_a_pair_is_exactly_what_the_reference_says() -> None:
    """In 16 bits, writing one half of a pair would round twice."""
    made = tables(torch.bfloat16)
    guard = guards()[0]
    made.fill(np.full(48, made.row([(guard, True)])))
    hidden, other = residual(48, torch.bfloat16)
    whole = hidden + other
    ((probe, gate),) = guard.gates()
    due = correct(whole, torch.from_numpy(probe.v.copy()), torch.from_numpy(gate.row()))[0]
    steer(hidden, other, made.slots, made.layers[1])
    assert torch.equal(hidden + other, due)


def test_counters_and_records_are_what_happened() -> None:
    made, every = tables(), guards()
    acting = [[every[1]], [], [every[1], every[2]], [every[2]]] * 8
    made.fill(np.array([made.row([(guard, True) for guard in some]) for some in acting]))
    hidden, other = residual(32, torch.float32)
    whole = hidden + other
    steer(hidden, other, made.slots, made.layers[1])
    found = {one["guard"]: one for one in made.counters()}
    for guard in every[1:3]:
        (probe,) = guard.probes
        own = [i for i, some in enumerate(acting) if guard in some]
        stage = [acting[i].index(guard) for i in own]
        rho = np.array([float(made.layers[1].rho[k, i]) for k, i in zip(stage, own, strict=True)])
        delta = np.array([float(made.layers[1].delta[k, i]) for k, i in zip(stage, own, strict=True)])
        first = [i for i, k in zip(own, stage, strict=True) if k == 0]
        np.testing.assert_allclose(rho[np.array(stage) == 0], whole[first].numpy() @ probe.v, rtol=1e-4, atol=1e-4)
        one = found[guard.name]
        assert one["seen"] == one["expected"] == len(own)
        assert one["moved"] == int((delta != 0).sum()) > 0
        assert one["largest_shift"] == pytest.approx(np.abs(delta).max())
        assert one["mean_shift"] == pytest.approx(np.abs(delta).sum() / one["moved"])
        bins = np.clip(((rho - one["low"]) * one["bins_per_unit"]).astype(int), 0, BINS - 1)
        assert one["histogram"] == np.bincount(bins, minlength=BINS).tolist()
    assert found[every[0].name]["seen"] == 0


def test_broken_residuals_are_left_alone() -> None:
    made = tables()
    made.fill(np.full(3, made.row([(guards()[0], True)])))
    hidden, other = residual(3, torch.float32)
    hidden[0, 0], hidden[1, 1] = torch.nan, torch.inf
    before = hidden.clone()
    steer(hidden, other, made.slots, made.layers[1])
    assert torch.equal(hidden[:2].nan_to_num(1.0), before[:2].nan_to_num(1.0))
    assert not torch.equal(hidden[2], before[2])


def test_a_stage_that_only_looks_moves_nothing_and_records() -> None:
    made = tables()
    guard = guards()[0]
    made.fill(np.full(4, made.row([(guard, False)])))
    hidden, other = residual(4, torch.float32)
    before = hidden.clone(), other.clone()
    steer(hidden, other, made.slots, made.layers[1])
    assert torch.equal(hidden, before[0])
    assert torch.equal(other, before[1])
    np.testing.assert_allclose(
        made.layers[1].rho[0, :4].numpy(), (hidden + other).numpy() @ guard.probes[0].v, rtol=1e-4, atol=1e-4
    )


def test_padding_and_what_came_before_are_not_steered() -> None:
    made = tables()
    made.fill(np.full(8, made.row([(guards()[0], True)])))
    made.fill(np.full(3, made.row([(guards()[0], True)])))
    assert made.slots.tolist()[:8] == [made.slots[0].item()] * 3 + [0] * 5
    assert not made.idle
    made.clear()
    assert made.idle
    assert not made.slots.any()


def test_a_zeroed_table_is_not_the_reference() -> None:
    """The negation: were the gates not written, the checks above would fail."""
    made = tables()
    guard = guards()[0]
    row = made.row([(guard, True)])
    made.layers[1].gates[row] = 0
    made.fill(np.full(8, row))
    hidden, other = residual(8, torch.float32)
    whole = hidden + other
    steer(hidden, other, made.slots, made.layers[1])
    ((probe, gate),) = guard.gates()
    assert not torch.allclose(hidden + other, correct(whole, torch.from_numpy(probe.v.copy()), torch.from_numpy(gate.row()))[0])


def test_residuals_are_kept_after_correction() -> None:
    made = tables(keep=True)
    made.fill(np.full(5, made.row([(guards()[0], True)])))
    hidden, other = residual(5, torch.float32)
    steer(hidden, other, made.slots, made.layers[1])
    keep(hidden, other, made.layers[1])
    kept = made.layers[1].kept
    assert kept is not None
    assert torch.equal(kept[:5], hidden + other)


# -------------------------------------------------------------------------------------------------------- tables


def test_rows_are_reused_and_the_oldest_makes_room() -> None:
    made = tables(rows=4)  # the shut one, and three
    every = guards()
    first = made.row([(every[0], True)])
    assert made.row([(every[0], True)]) == first != 0
    second, third = made.row([(every[1], True)]), made.row([(every[2], True)])
    assert len({first, second, third}) == 3
    made.row([(every[0], True)])  # used again, so the second is the oldest
    assert made.row([(every[3], True)]) == second
    assert made.row([(every[4], True)], in_use=[third]) == first, "a row in use stays"
    assert made.row([]) == 0


def test_what_was_seen_under_a_row_that_made_room_is_still_accounted_for() -> None:
    made = tables(rows=3)
    every = guards()
    for guard in every[:4]:
        made.fill(np.full(5, made.row([(guard, True)])))
        steer(*residual(5, torch.float32), made.slots, made.layers[1])
    assert [one["seen"] for one in made.counters()[:4]] == [one["expected"] for one in made.counters()[:4]] == [5] * 4


def test_a_guard_on_a_closed_layer_or_without_room_is_refused_whole() -> None:
    made = Tables((1, 2), rows=4, stages=2, directions=1, tokens=8, width=WIDTH, device="cpu", dtype=torch.float32)
    both = tiny.guard(IDENTITY, StTP(3), (tiny.probe(1, WIDTH), tiny.probe(3, WIDTH)), name="both")
    with pytest.raises(InputError, match=r"layers \[3\], and this engine has open layers \[1, 2\]"):
        made.add(both)
    made.add(tiny.guard(IDENTITY, SwFC(1), (tiny.probe(2, WIDTH),), name="one"))
    two = tiny.guard(IDENTITY, SwFC(1), (tiny.probe(1, WIDTH), tiny.probe(2, WIDTH)), name="two")
    with pytest.raises(InputError, match=r"no room for another guard on layers \[2\]"):
        made.add(two)
    made.remove("one")
    made.add(two)
    assert {(one["guard"], one["layer"]) for one in made.counters()} == {("two", 1), ("two", 2)}


def test_a_removed_guard_takes_its_rows_along() -> None:
    made, every = tables(), guards()
    row = made.row([(every[0], True), (every[1], True)])
    made.remove(every[0].name)
    made.add(every[0])
    assert made.row([(every[1], True)]) == row, "its row is free again"
