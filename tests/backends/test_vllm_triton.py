"""The fused kernel does what the portable one does: interpreted where there is no GPU, compiled where there is one.

What is compared, and against what sabotage, stands in `triton_cases`. Interpreted checks run in a process of their own,
so that whatever else is tested beside them has the Triton that it would have without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import CASES, CHECKS, VARIANTS, Batch, Case, agree, batch, fused, portable

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with vLLM, or pip install triton"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
LONG = [case.name for case in CASES if case.stages != 2 or case.width > 48]
"""Cases that the interpreter takes a second for, each."""
SHORT = [name for name in CHECKS if name not in LONG]


def in_another_process(*arguments: str, interpret: bool) -> dict[str, Any]:
    """What `triton_cases.py` prints, given these arguments."""
    found: dict[str, Any] = json.loads(
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("triton_cases.py")), *arguments],
            env={**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def short() -> dict[str, str | None]:
    return in_another_process(*SHORT, interpret=True)


@pytest.fixture(scope="module")
def long() -> dict[str, str | None]:
    return in_another_process(*LONG, interpret=True)


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    return in_another_process("--compile", interpret=False)


@needs_triton
@pytest.mark.parametrize("name", SHORT)
def test_interpreted(short: dict[str, str | None], name: str) -> None:
    assert short[name] is None, short[name]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_interpreted_at_length(long: dict[str, str | None], name: str) -> None:
    assert long[name] is None, long[name]


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_compiles_for_gpus_that_are_not_here(assembly: dict[str, str], variant: str) -> None:
    """What the interpreter lets pass and the compiler does not; and how the machine code rounds and reads."""
    code = assembly[variant]
    assert "fma" not in code, "a product and a sum are rounded together"
    assert "red.global" in code, "the counters are not atomic"
    if "8192" in variant or "5120" in variant:
        assert "ld.global.v4" in code, "the residual is not read in pieces of 16 bytes"
    if "bf16" in variant:
        assert "cvt.rn.bf16" in code, "not rounded to nearest even"


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name: str) -> None:
    CHECKS[name]("cuda")


def gates_reversed(given: Batch) -> None:
    given.table.gates[1:] = given.table.gates[1:].flip(0)


def slots_moved(given: Batch) -> None:
    tokens = len(given.hidden)
    given.slots[:tokens] = given.slots[:tokens].roll(7)


def slots_cleared(given: Batch) -> None:
    given.slots.zero_()


def another_direction(given: Batch) -> None:
    given.table.v.copy_(given.table.v.flip(0))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "single"])
@pytest.mark.parametrize("width", [1000, 5120])
def test_a_captured_graph_does_right_by_later_batches(width: int, pair: bool) -> None:
    first = batch(Case(3, width, "bfloat16", pair=pair), "cuda")
    live = first.clone()
    fused(live)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(live)
    changes: list[Callable[[Batch], None]] = [
        lambda given: None, slots_moved, gates_reversed, another_direction, slots_cleared, lambda given: None,
    ]  # fmt: skip
    for seed, change in enumerate(changes):
        # what the graph reads is written in place, as the engine does it
        before = batch(Case(3, width, "bfloat16", pair=pair), "cuda", seed=seed)
        change(before)
        into(live, before)
        theirs = before.clone()
        graph.replay()
        portable(theirs)
        agree(live, theirs, before)


def into(live: Batch, given: Batch) -> None:
    for mine, its in ((live, given), (live.table, given.table)):
        for field in fields(mine):
            if isinstance(own := getattr(mine, field.name), torch.Tensor):
                own.copy_(getattr(its, field.name))
