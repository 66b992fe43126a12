"""What the kernel costs on a GPU: the fused one beside the portable one, and beside reading the residual at all.

    python benchmarks/kernel.py
    python benchmarks/kernel.py --width 5120 --tokens 1 256 --guards 64

For each width and number of tokens, microseconds of one launch, each arm captured in a CUDA graph of its own as an engine
would run it, so that no Python is timed; the portable kernel asks the host which tokens move, cannot be captured, and is
timed as it runs. Ratios are of the same round, median [min, max]. `idle`: nothing acts on any token. `shut`: every
token is looked at, none moves. `push`: every token moves. `copy`: the two halves read and written by torch, which is
what any steering at all would have to move.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from steerguard.backends.vllm import kernel
from steerguard.backends.vllm.tables import LayerTables
from steerguard.rules import INF, Gate

GATES = {
    "shut": Gate(-1e30, 0.0, -1.0, 0.0, 0.0, INF),
    "push": Gate(-INF, 0.0, 0.0, 1.0, 0.0, INF),
}


def table(gate: Gate, guards: int, tokens: int, width: int) -> LayerTables:
    """One row for each guard, each along a direction of its own."""
    made = LayerTables.empty(
        rows=guards + 1, stages=4, directions=guards, tokens=tokens, width=width, device="cuda", dtype=torch.bfloat16, keep=False
    )
    made.v.copy_(torch.nn.functional.normalize(torch.randn_like(made.v)))
    made.direction[1:, 0] = torch.arange(guards, device="cuda")
    made.gates[1:, 0] = torch.from_numpy(gate.row()).cuda()
    made.axis[:, 1] = 1.0
    return made


def captured(call: Callable[[], object], repeats: int) -> Callable[[], object]:
    """`call` so many times in one CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def microseconds(call: Callable[[], object], launches: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / launches


def arms(width: int, tokens: int, guards: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Each arm, and how many launches one call of it is."""
    from steerguard.backends.vllm.kernel_triton import steer

    hidden, residual = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    spare = torch.empty_like(hidden), torch.empty_like(residual)
    rows = (torch.arange(tokens, device="cuda", dtype=torch.int32) % guards) + 1
    tables = {name: table(gate, guards, tokens, width) for name, gate in GATES.items()}
    nobody, repeats = torch.zeros_like(rows), 20

    def copy() -> None:
        spare[0].copy_(hidden)
        spare[1].copy_(residual)

    found: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (captured(copy, repeats), repeats),
        "fused, idle": (captured(partial(steer, hidden, residual, nobody, tables["shut"]), repeats), repeats),
    }
    for name, own in tables.items():
        found[f"fused, {name}"] = captured(partial(steer, hidden, residual, rows, own), repeats), repeats
        found[f"portable, {name}"] = partial(kernel.steer, hidden, residual, rows, own), 1
    return found


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):9.3f} [{min(values):.3f}, {max(values):.3f}]"


def measure(width: int, tokens: int, guards: int, rounds: int) -> None:
    timed = arms(width, tokens, guards)
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds + 3):
        for name in list(timed)[:: 1 if i % 2 else -1]:
            took = microseconds(*timed[name])
            if i >= 3:
                taken[name].append(took)
    print(f"\nd = {width}, {tokens} tokens, {guards} guards: microseconds per launch; over copy")
    for name, own in taken.items():
        print(f"  {name:16} {shown(own)}   {shown([a / b for a, b in zip(own, taken['copy'], strict=True)])}")
    for gate in GATES:
        ratios = [a / b for a, b in zip(taken[f"portable, {gate}"], taken[f"fused, {gate}"], strict=True)]
        print(f"  portable over fused, {gate}: {shown(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[5120, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 2048])
    parser.add_argument("--guards", type=int, default=1, help="different guards in the batch")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark times the kernel on a GPU, and torch sees no CUDA device here; run it where there is one.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    for width in options.width:
        for tokens in options.tokens:
            measure(width, tokens, options.guards, options.rounds)


if __name__ == "__main__":
    main()
