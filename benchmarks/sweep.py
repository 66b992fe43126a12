"""What batching settings buys a sweep, and what distinct guards cost an engine. Ratios within one run; wants an idle machine.

    python benchmarks/sweep.py                     transformers: many settings in one batch over one setting at a time
    python benchmarks/sweep.py --backend vllm      vLLM: the rows of a sweep over the same rows unguarded

Answers are greedy, and are compared: a setting answers the same in any company, or this says that it does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import steerguard as sg
from steerguard.backends.base import GREEDY
from steerguard.fitting import prompts_of
from steerguard.guard import Guard
from steerguard.probe import Evidence, Probe

SAMPLING = replace(GREEDY, max_new_tokens=60)
STRENGTHS = {"SwFC": (1, 2, 3), "StTP": (0, 12, 24, 36), "StMP": (1, 2, 3)}
EVIDENCE = Evidence(1.0, 0.9, 1.0, 2.0, 0.9, 0.9, 50, 50)


def guards(model: Any, layers: Sequence[int]) -> list[Guard]:
    """A guard of every rule and strength on every layer, along random directions through the middle of real residuals."""
    residuals = model.residuals("Which river runs through Harlow?", "Its river is called the Merrin.")
    made = []
    for layer in layers:
        v = np.random.default_rng(layer).normal(size=model.identity.width).astype(np.float32)
        v /= np.linalg.norm(v)
        rho = residuals[layer] @ v
        m, s = float(np.median(rho)), float(rho.std())
        probe = Probe(layer, v, m, m + s, s / 4, m - s, s / 4, EVIDENCE)
        for name, strengths in STRENGTHS.items():
            made += [Guard(f"{name}-{a}-{layer}", (probe,), sg.rule(name, a), model.identity) for a in strengths]
    return made


def timed(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def batched(model: Any, prompts: Sequence[Any], own: Sequence[Guard], rows: int) -> list[Any]:
    """Every guard on every prompt, so many rows at a time."""
    flat = [(prompt, guard) for guard in own for prompt in prompts]
    out: list[Any] = []
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows]
        out += model.generate([prompt for prompt, _ in part], guards=[guard for _, guard in part], sampling=SAMPLING)
    return out


def one_at_a_time(model: Any, prompts: Sequence[Any], own: Sequence[Guard]) -> list[Any]:
    return [answer for guard in own for answer in model.generate(list(prompts), guards=guard, sampling=SAMPLING)]


def alone(model: Any, prompts: Sequence[Any], own: Sequence[Guard]) -> list[Any]:
    return [model.generate(prompt, guards=guard, sampling=SAMPLING)[0] for guard in own for prompt in prompts]


def told(what: str, ratios: Sequence[float]) -> None:
    print(f"{what:64}{statistics.median(ratios):7.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="hf", choices=("hf", "vllm"))
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--scenarios", type=int, nargs="+", default=[8, 32], help="select scenarios that a setting answers")
    parser.add_argument("--trait", nargs="+", default=["honesty", "compassion"], help="of the bundled model")
    parser.add_argument("--rows", type=int, default=256, help="rows of one batch")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model: Any = sg.load("organism", backend=given.backend)
    own = guards(model, given.layers)
    if given.backend == "vllm":
        prompts = [prompts_of(s)[1] for s in sg.trait("organism-honesty").select]
        pairs = []
        for i in range(given.rounds + 1):  # the first warms up
            swept, _ = timed(lambda: batched(model, prompts, own, len(prompts) * len(own)))
            plain, _ = timed(lambda: model.generate(list(prompts) * len(own), sampling=SAMPLING))
            pairs += [(swept, plain)] if i else []
        tokens = sum(len(a.ids) for a in batched(model, prompts, own, len(prompts) * len(own)))
        unguarded = sum(len(a.ids) for a in model.generate(list(prompts) * len(own), sampling=SAMPLING))
        print(f"{len(own)} settings x {len(prompts)} scenarios in one call, tokens per second over the same rows unguarded:")
        told("  throughput", [(tokens / swept) / (unguarded / plain) for swept, plain in pairs])
        return
    for trait in given.trait:
        for n in given.scenarios:
            batching(model, own, [prompts_of(s)[1] for s in sg.trait(f"organism-{trait}").select[:n]], trait, given)


def batching(model: Any, own: Sequence[Guard], prompts: Sequence[Any], trait: str, given: argparse.Namespace) -> None:
    """Three ways to the same answers, each round in another order; the first round warms up."""
    few = own[:4]
    ways: dict[str, Callable[[], list[Any]]] = {
        "together": lambda: batched(model, prompts, own, given.rows), "apart": lambda: one_at_a_time(model, prompts, own),
        "alone": lambda: alone(model, prompts, few),
    }  # fmt: skip
    apart, single, differing, tokens = [], [], 0, 0.0
    for i in range(given.rounds + 1):
        order = list(ways) if i % 2 else list(reversed(ways))
        took = {name: timed(ways[name]) for name in order}
        (together, a), (one, b), (each, c) = (took[name] for name in ways)
        differing += sum(x.ids != y.ids for x, y in [*zip(a, b, strict=True), *zip(a, c, strict=False)])
        tokens = statistics.mean(len(x.ids) for x in a)
        if i:
            apart.append(one / together)
            single.append(each * len(own) / len(few) / together)
    print(f"{trait}, {len(own)} settings x {len(prompts)} scenarios, answers of {tokens:.0f} tokens")
    print(f"  {given.rows} rows at a time; {differing} answers differ")
    told("  faster than one setting at a time (its scenarios in one batch)", apart)
    told(f"  faster than one answer at a time (of {len(few)} settings)", single)


if __name__ == "__main__":
    main()
