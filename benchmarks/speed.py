"""What guarding costs: ratios within one run, never single absolute times.

    python benchmarks/speed.py                         organism and Qwen3-0.6B's shape on this machine
    python benchmarks/speed.py --shape qwen3-32b --device cuda --dtype bfloat16 --batch 1 64

Arms are timed in turn (A B C A B C ...), and a ratio is the median over the rounds of the same round's quotient, so
that a machine whose speed drifts drifts for all arms. Weights are random: cost does not depend on them. If the package
`steering-vectors` is installed, its additive hook is one of the arms. Wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steerguard as sg
from steerguard.backends.base import Backend, Sampling
from steerguard.probe import Evidence, Probe

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-32b": {
        "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip


def build(shape: str, device: str, dtype: str) -> Backend:
    """The organism, or a random model of a shape with the organism's tokenizer."""
    if shape == "organism":
        return sg.load("organism")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from steerguard.backends.hf import wrap

    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        module = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], max_position_embeddings=4096)).eval()
        torch.set_default_dtype(torch.float32)
    return wrap(module, sg.load("organism").tokenizer)


def probe(model: Backend, layer: int) -> Probe:
    """A random unit direction whose boundary lies in the middle of what the model's residual projects to."""
    v = np.random.default_rng(0).normal(size=model.identity.width).astype(np.float32)
    v /= np.linalg.norm(v)
    rho = model.residuals("How is the river through the town called?")[layer] @ v
    m, s = float(np.median(rho)), float(rho.std())
    return Probe(layer, v, m, m + s, s, m - s, s, Evidence(1.0, 0.9, 1.0, 2.0, 0.9, 0.9, 50, 50))


def rounds(arms: dict[str, Callable[[], Any]], n: int, device: str) -> dict[str, list[float]]:
    """Seconds of every arm in every round, the first round (warm-up) left out."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(n + 1):
        order = list(arms) if i % 2 else list(arms)[::-1]
        for name in order:
            _synchronise(device)
            start = time.perf_counter()
            arms[name]()
            _synchronise(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median and spread of each arm over the base arm, round by round."""
    out = {}
    for name, seconds in times.items():
        quotients = sorted(a / b for a, b in zip(seconds, times[base], strict=True))
        out[name] = {"median": statistics.median(quotients), "min": quotients[0], "max": quotients[-1]}
    return out


def generation(model: Any, batch: int, tokens: int, n: int, device: str) -> dict[str, dict[str, float]]:
    """Guarded over unguarded generation of `tokens` tokens for `batch` prompts."""
    module = model.module
    model._engine = replace(model._engine, ends=())  # no end of turn: every arm generates the same number of tokens
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    prompts: list[Any] = [f"Tell me about number {i} and about the river of the town." for i in range(batch)]
    layer = model.identity.depth // 2
    guards = {rule.name: _guard(model, layer, rule) for rule in (sg.SwFC(1), sg.StTP(6), sg.StMP(1))}
    each = [list(guards.values())[i % 3] for i in range(batch)]
    arms: dict[str, Callable[[], Any]] = {"unguarded": lambda: model.generate(prompts, sampling=sampling)}
    for name, guard in guards.items():
        arms[name] = lambda guard=guard: model.generate(prompts, guards=guard, sampling=sampling)
    if batch > 1:
        arms["three guards, one per row"] = lambda: model.generate(prompts, guards=each, sampling=sampling)
    additive = _steering_vectors(module, guards["SwFC"])
    if additive is not None:
        def with_additive() -> None:
            with additive():
                model.generate(prompts, sampling=sampling)
        arms["steering-vectors, additive"] = with_additive
    return ratios(rounds(arms, n, device), "unguarded")


def _guard(model: Backend, layer: int, rule: sg.Rule) -> sg.Guard:
    return sg.Guard(name="speed", probes=(probe(model, layer),), rule=rule, model=model.identity)


def _steering_vectors(module: Any, guard: sg.Guard) -> Callable[[], Any] | None:
    """The additive hook of the package steering-vectors with the same vector on the same layer, if it is installed."""
    try:
        from steering_vectors import SteeringVector
    except ImportError:
        return None
    ((p, gate),) = guard.gates()
    vector = torch.tensor(p.v * np.float32(gate.above_a)).to(module.device, module.dtype)
    steering = SteeringVector({p.layer: vector}, layer_type="decoder_block")
    return lambda: steering.apply(module)


def capture(model: Backend, answers: int, n: int, device: str) -> dict[str, dict[str, float]]:
    """Answer-averaged residuals of every layer over a plain forward of the same batches."""
    text = "The river through the town is old. People have lived beside it for as long as anybody can tell. " * 4
    exchanges: list[Any] = [("How is the river called?", text)] * answers
    arms = {
        "plain forward": lambda: plain_forward(model, exchanges),
        "capture of all layers": lambda: model.capture(exchanges),
    }
    return ratios(rounds(arms, n, device), "plain forward")


def plain_forward(model: Any, exchanges: list[Any]) -> None:
    """The same batches through the same decoder (no logits), with nothing read from it."""
    from steerguard.backends.hf_generate import batches
    from steerguard.backends.hf_read import headless
    from steerguard.prompts import as_conversation, render

    rendered = [render(model.tokenizer, as_conversation(prompt), answer).ids for prompt, answer in exchanges]
    body = headless(model.module, model.blocks)
    for batch in batches([len(ids) for ids in rendered], model.batch_tokens):
        width = max(len(rendered[i]) for i in batch)
        padded = torch.tensor([[*rendered[i], *[0] * (width - len(rendered[i]))] for i in batch])
        with torch.no_grad():
            body(input_ids=padded.to(model.module.device), use_cache=False)


def peak_memory(answers: int) -> float:
    """MiB above the loaded model that capturing takes at its peak, in a process of its own."""
    code = f"""
import resource, steerguard as sg
model = sg.load("organism")
text = "The river through the town is old. People have lived beside it for long. " * 4
model.capture([("How is the river called?", text)] * 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.capture([("How is the river called?", text)] * {answers})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) / 1024


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, r in table.items():
        print(f"  {name:28s} {r['median']:.3f}   [{r['min']:.3f}, {r['max']:.3f}]")


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["organism", "qwen3-0.6b"], choices=["organism", *SHAPES])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if args.device != "cpu" else cpu
    print(f"torch {torch.__version__}, {where}, {args.dtype}; ratios: median of {args.rounds} rounds [min, max]")
    results: dict[str, Any] = {}
    for shape in args.shape:
        model = build(shape, args.device, args.dtype)
        for batch in args.batch:
            title = f"{shape}, generation, batch {batch}, {args.tokens} tokens, over unguarded"
            results[title] = generation(model, batch, args.tokens, args.rounds, args.device)
            show(title, results[title])
        title = f"{shape}, capture of all layers, 32 answers, over a plain forward"
        results[title] = capture(model, 32, args.rounds, args.device)
        show(title, results[title])
        del model
    if "organism" in args.shape:
        print("\npeak memory of capture above the loaded model, organism")
        for answers in (64, 512, 2048):
            results[f"peak MiB, {answers} answers"] = peak_memory(answers)
            print(f"  {answers:5d} answers {results[f'peak MiB, {answers} answers']:7.1f} MiB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
