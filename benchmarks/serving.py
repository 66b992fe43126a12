"""What guarding costs on vLLM: ratios within one run, never single absolute times.

    python benchmarks/serving.py --json serving.json            organism and Qwen3-0.6B's shape on this machine's CPU
    python benchmarks/serving.py --device cuda --shape qwen3-32b                 the same on a GPU, in bfloat16
    python benchmarks/serving.py --shape organism --lens-python PATH             with vllm-lens beside it

Wants vLLM, steerguard installed beside it, and a machine that does nothing else. Arms:

  absent        vLLM without the plugin
  present       the plugin is there, and not configured
  idle          guards are loaded and their layer is open; every request asks for none
  one gated     every request has the same StTP guard: only tokens below its boundary move
  one additive  every request has the same SwFC guard: every token moves
  64 distinct   64 guards along directions of their own, a request has one of them; of a batch, neighbours differ

Engines of different configurations cannot live in one process. Each has a worker process of its own, started once and
then asked over a pipe, one at a time and in turn (A B C C B A ...); an idle worker computes nothing. A ratio is the
median over the rounds of the same round's quotient. Where two engines don't fit into the memory (`--one-at-a-time`,
always so on a GPU), each round starts each engine anew; ratios over `idle` are then the close ones.

Everything is as vLLM has it by default: compiled, CUDA graphs on a GPU, prefix caching on. Prompts are random and
distinct, answers are greedy and of one length. Measured: output tokens per second of the whole batch; time per output
token after a request's first, and time to its first, both the mean over requests by vLLM's own clock. Weights of a
shape are random: cost does not depend on them. The share of tokens that moved is read from the counters, and printed.

vllm-lens: version 1.3.0 wants Python 3.12 and vLLM 0.30.0 exactly, for which there is no CPU build on PyPI; so its own
requirements cannot be met on a CPU. Its code runs on Python 3.11 and vLLM 0.32's CPU build all the same, and steers, if
its pins are overridden (`pip install --no-deps --ignore-requires-python vllm-lens`, then zstandard and cloudpickle, in an
environment with vLLM): PATH is that environment's Python. It runs there without compilation, as it does everywhere (it
forces eager mode), and its ratios are over the same environment's vLLM without it, compiled.

Memory: Qwen3-0.6B's shape takes about 7 GB for each engine at batch 64 in float32, all of them at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-32b": {
        **QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
DEFAULTS = {
    ("organism", "cpu"): {"prompt": 32, "tokens": 32, "rounds": 11},
    ("qwen3-0.6b", "cpu"): {"prompt": 8, "tokens": 8, "rounds": 3},
}
"""Tokens of a prompt, of an answer, and rounds; so that the whole takes about ten minutes on two cores."""
OTHERWISE = {"prompt": 128, "tokens": 128, "rounds": 5}
DISTINCT = 64
METRICS = {"tokens/s": "output tokens per second", "per token": "time per output token", "first": "time to first token"}


@dataclass(frozen=True)
class Engine:
    """One vLLM engine as it is started."""

    python: str
    plugins: str
    "what VLLM_PLUGINS says"
    configured: bool = False


@dataclass(frozen=True)
class Arm:
    """What the requests of an engine say."""

    engine: str
    base: str
    "the arm that stands for no steering at all"
    guards: tuple[str, ...] | None = None
    "one of them for each request, in turn; empty for none; None: the request says nothing"
    lens: bool = False


def engines(lens_python: str | None) -> dict[str, Engine]:
    found = {
        "absent": Engine(sys.executable, ""),
        "present": Engine(sys.executable, "steerguard"),
        "configured": Engine(sys.executable, "steerguard", configured=True),
    }
    if lens_python:
        found |= {"lens absent": Engine(lens_python, ""), "lens": Engine(lens_python, "activations")}
    return found


ARMS = {
    "absent": Arm("absent", "absent"),
    "present": Arm("present", "absent"),
    "idle": Arm("configured", "absent", ()),
    "one gated": Arm("configured", "absent", ("gated",)),
    "one additive": Arm("configured", "absent", ("additive",)),
    f"{DISTINCT} distinct": Arm("configured", "absent", tuple(f"guard{i}" for i in range(DISTINCT))),
    "lens absent": Arm("lens absent", "lens absent"),
    "lens idle": Arm("lens", "lens absent"),
    "lens additive": Arm("lens", "lens absent", lens=True),
}


# ------------------------------------------------------------------------------------------------- in a worker


def worker() -> None:
    """Start the engine that the first line describes; answer each line that follows with what was measured."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer

    def tell(what: Any) -> None:
        channel.write(json.dumps(what) + "\n")
        channel.flush()

    options = json.loads(sys.stdin.readline())
    import torch
    from vllm.engine.arg_utils import EngineArgs

    import vllm
    from vllm import LLM

    llm = LLM(**options)
    config = llm.llm_engine.vllm_config
    tell({
        "vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "steerguard": hasattr(EngineArgs.create_engine_config, "steerguard"), "lens": hasattr(LLM, "register_hooks"),
        "compiled": not config.model_config.enforce_eager, "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    })  # fmt: skip
    warm = set()
    for line in sys.stdin:
        asked = json.loads(line)
        kind = (asked["arm"], asked["batch"])
        if kind not in warm:
            warm.add(kind)
            measure(llm, {**asked, "tokens": min(asked["tokens"], 8), "seed": -1 - asked["seed"]})
        before = counted(llm)
        told = measure(llm, asked)
        after = counted(llm)
        tell({**told, "seen": after[0] - before[0], "moved": after[1] - before[1]})


def measure(llm: Any, asked: dict[str, Any]) -> dict[str, float]:
    """Answer one batch."""
    from vllm import SamplingParams

    batch, tokens, draw = asked["batch"], asked["tokens"], random.Random(str((asked["seed"], asked["arm"], asked["batch"])))
    prompts = [{"prompt_token_ids": [draw.randrange(16, 2000) for _ in range(asked["prompt"])]} for _ in range(batch)]
    params = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=said(llm, asked, i)
        )
        for i in range(batch)
    ]  # fmt: skip
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
    assert not any(output.num_cached_tokens for output in outputs), "prompts are distinct"
    clocks = [output.metrics for output in outputs]
    return {
        "tokens/s": batch * tokens / seconds,
        "per token": statistics.mean((one.last_token_ts - one.first_token_ts) / (tokens - 1) for one in clocks),
        "first": statistics.mean(one.first_token_latency for one in clocks),
    }


def said(llm: Any, asked: dict[str, Any], i: int) -> dict[str, Any] | None:
    """What the i-th request says of steering."""
    if asked["lens"]:
        import torch
        from vllm_lens import SteeringVector

        width, depth = asked["model"]
        vector = torch.nn.functional.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(0)))
        return {"apply_steering_vectors": [SteeringVector(activations=vector, layer_indices=[depth // 2])]}
    guards = asked["guards"]
    if guards is None:
        return None
    return {"steering": {"guards": [guards[(i + asked["seed"]) % len(guards)]] if guards else []}}


def counted(llm: Any) -> tuple[int, int]:
    """Tokens that guards looked at and that they moved, since the start."""
    if "steerguard" not in (llm.llm_engine.vllm_config.additional_config or {}):
        return 0, 0
    found = llm.collective_rpc("steerguard_counters")[0]
    return sum(one["seen"] for one in found), sum(one["moved"] for one in found)


# ---------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Model:
    """A model's folder, and what is needed to serve it."""

    folder: str
    width: int
    depth: int
    options: dict[str, Any]
    "how vLLM loads it"
    settings: dict[str, Any]
    "steerguard's"
    kv_bytes: int
    "of keys and values of one token in four bytes each"


def prepare(shape: str, at: Path) -> Model:
    """The organism or a config folder of a shape, and guards for it. Nothing of torch or vLLM is started for it."""
    import numpy as np

    import steerguard as sg
    from steerguard.organism import folder
    from steerguard.probe import Evidence, Probe

    identity, options, where = sg.load("organism").identity, {}, folder()
    config = json.loads((where / "config.json").read_text())
    if shape != "organism":
        config, where, options = SHAPES[shape], at / shape, {"load_format": "dummy"}
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folder() / file, where / file)
        identity = replace(
            identity, name=shape, architecture=config["architectures"][0], width=config["hidden_size"],
            depth=config["num_hidden_layers"],
        )  # fmt: skip
    files = []
    for i, name in enumerate(("gated", "additive", *(f"guard{i}" for i in range(DISTINCT)))):
        v = np.random.default_rng(i).normal(size=identity.width).astype(np.float32)
        probe = Probe(
            identity.depth // 2, v / np.linalg.norm(v), 0.0, 1.0, 0.5, -1.0, 0.5, Evidence(1.0, 0.9, 1.0, 2.0, 0.9, 0.9, 50, 50)
        )
        rule = sg.SwFC(1) if name == "additive" else sg.StTP(1)
        files.append(at / f"{shape}-{name}.guard")
        sg.Guard(name=name, probes=(probe,), rule=rule, model=identity).save(files[-1])
    waived = [] if shape == "organism" else ["weights"]
    settings = {"guards": [str(file) for file in files], "default": [], "allow_mismatch": waived}
    per_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return Model(str(where), identity.width, identity.depth, options, settings, per_token)


class Workers:
    """The engines of one model, started when they are first asked."""

    def __init__(self, model: Model, options: dict[str, Any], of: dict[str, Engine], alone: bool) -> None:
        self._model, self._options, self._of, self._alone = model, options, of, alone
        self._running: dict[str, subprocess.Popen[str]] = {}
        self.told: dict[str, dict[str, Any]] = {}
        "what each engine said of itself"

    def ask(self, name: str, question: dict[str, Any]) -> dict[str, float]:
        if name not in self._running:
            if self._alone:
                self.stop()
            self._start(name, self._of[name])
        else:
            time.sleep(0.2)  # threads of the engine asked before spin for a moment
        return self._exchange(self._running[name], question)

    def _start(self, name: str, engine: Engine) -> None:
        environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ,
            "VLLM_PLUGINS": engine.plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        options = {"model": self._model.folder, "disable_log_stats": False, **self._options, **self._model.options}
        if engine.configured:
            options["additional_config"] = {"steerguard": self._model.settings}
        command = [engine.python, str(Path(__file__).resolve()), "--worker"]
        running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        self._running[name] = running
        told = self.told[name] = self._exchange(running, options)
        if told["steerguard"] != (engine.plugins == "steerguard") or told["lens"] != (engine.plugins == "activations"):
            sys.exit(f"engine {name!r} has other plugins than VLLM_PLUGINS={engine.plugins!r} says: {told}")

    @staticmethod
    def _exchange(running: subprocess.Popen[str], what: dict[str, Any]) -> dict[str, Any]:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(json.dumps(what) + "\n")
        running.stdin.flush()
        line = running.stdout.readline()
        if not line:
            sys.exit(f"an engine ended with status {running.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        for running in self._running.values():
            assert running.stdin is not None
            running.stdin.close()
            running.wait()
        self._running.clear()


def order(rounds: int, batches: Sequence[int], names: Sequence[str], alone: bool) -> Iterator[tuple[int, int, str]]:
    """Round, batch and engine of each visit: engines in turn, there and back."""
    if alone:
        yield from ((r, b, name) for r in range(rounds) for name in names[:: 1 if r % 2 else -1] for b in batches)
    else:
        yield from ((r, b, name) for b in batches for r in range(rounds) for name in names[:: 1 if r % 2 else -1])


Arms = dict[str, list[dict[str, float]]]
"""Arm -> what was measured, round by round."""


def run(
    workers: Workers, model: Model, names: Sequence[str], batches: Sequence[int], sizes: dict[str, int], alone: bool
) -> dict[int, Arms]:
    """What was measured at each batch size."""
    found: dict[int, Arms] = {b: {arm: [] for arm, one in ARMS.items() if one.engine in names} for b in batches}
    for r, batch, engine in order(sizes["rounds"], batches, names, alone):
        own = [name for name, arm in ARMS.items() if arm.engine == engine]
        for name in own[:: 1 if r % 2 else -1]:
            arm = ARMS[name]
            found[batch][name].append(workers.ask(engine, {
                "arm": name, "batch": batch, "prompt": sizes["prompt"], "tokens": sizes["tokens"], "seed": r,
                "guards": arm.guards, "lens": arm.lens, "model": (model.width, model.depth),
            }))  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------ what is told


def ratios(arms: Arms, name: str, base: str) -> dict[str, dict[str, float]]:
    """Median and spread of each metric of an arm over the base arm, round by round."""
    out = {}
    for metric in METRICS:
        quotients = [a[metric] / b[metric] for a, b in zip(arms[name], arms[base], strict=True)]
        out[metric] = {"median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}
    return out


def tables(arms: Arms) -> dict[str, dict[str, Any]]:
    """Ratios of every arm over the arm without steering, and over the idle arm of the same engine."""
    return {
        "over absent": {name: ratios(arms, name, ARMS[name].base) for name in arms if name != ARMS[name].base},
        "over idle, same engine": {
            name: ratios(arms, name, idle)
            for name in arms
            for idle in ("idle", "lens idle")
            if idle in arms and name != idle and ARMS[name].engine == ARMS[idle].engine
        },
    }


def show(title: str, arms: Arms) -> None:
    print(f"\n{title}")
    for base in sorted({ARMS[name].base for name in arms}):
        per_second, each, first = (statistics.median(one[metric] for one in arms[base]) for metric in METRICS)
        print(f"  {base}: {per_second:.0f} tokens/s, {each * 1e3:.2f} ms per token, {first * 1e3:.1f} ms to the first")
    for over, table in tables(arms).items():
        print(f"  {over:24s} " + " ".join(f"{what:>24s}" for what in METRICS.values()) + "   moved")
        for name, own in table.items():
            seen, moved = (sum(one[key] for one in arms[name]) for key in ("seen", "moved"))
            cells = " ".join(f"{r['median']:8.3f} [{r['min']:.3f}, {r['max']:.3f}]" for r in own.values())
            print(f"  {name:24s} {cells}   " + (f"{moved / seen:.0%}" if seen else "-"), flush=True)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def engine_options(args: argparse.Namespace, model: Model, sizes: dict[str, int]) -> dict[str, Any]:
    """vLLM's options for the largest batch; keys and values come in blocks of at most 128 tokens."""
    blocks = math.ceil((sizes["prompt"] + sizes["tokens"]) / 128) * max(args.batch) + 8
    memory = max(2**26, model.kv_bytes * 128 * blocks) if args.device == "cpu" else None
    longest = max(sizes["prompt"] + sizes["tokens"], 256)
    return {
        "dtype": args.dtype, "max_model_len": longest, "max_num_seqs": max(args.batch), "generation_config": "vllm",
        **({} if memory is None else {"kv_cache_memory_bytes": memory}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["organism", "qwen3-0.6b"], choices=["organism", *SHAPES])
    parser.add_argument("--batch", nargs="+", type=int, help="requests at once; 1 16 64, on a GPU 1 32 256")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt; by default as the shape allows")
    parser.add_argument("--tokens", type=int, help="tokens of an answer")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32; on a GPU bfloat16")
    parser.add_argument("--one-at-a-time", action="store_true", help="never two engines in memory; always so on a GPU")
    parser.add_argument("--without-present", action="store_true", help="leave that arm out, where memory holds two engines")
    parser.add_argument("--lens-python", help="the Python of an environment with vllm-lens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.batch = args.batch or ([1, 16, 64] if args.device == "cpu" else [1, 32, 256])
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    of, results = engines(args.lens_python), dict[str, Any]()
    if args.without_present:
        del of["present"]
    for shape in args.shape:
        chosen = {key: value for key in OTHERWISE if (value := getattr(args, key)) is not None}
        sizes = {**DEFAULTS.get((shape, args.device), OTHERWISE), **chosen}
        alone = args.one_at_a_time or args.device == "cuda"
        started = time.monotonic()
        with TemporaryDirectory() as folder:
            model = prepare(shape, Path(folder))
            workers = Workers(model, engine_options(args, model, sizes), of, alone)
            try:
                found = run(workers, model, list(of), args.batch, sizes, alone)
            finally:
                workers.stop()
        for name, told in workers.told.items():
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in told.items())}")
        print(f"{shape} on {processor()}, {os.cpu_count()} cores; median of {sizes['rounds']} rounds [min, max]")
        for batch, arms in found.items():
            show(f"{shape}, batch {batch}, prompts of {sizes['prompt']}, {sizes['tokens']} tokens each", arms)
        results[shape] = {
            "engines": workers.told, "processor": processor(), "cores": os.cpu_count(), "sizes": sizes,
            "model": asdict(model) | {"folder": shape, "settings": None}, "seconds": time.monotonic() - started,
            "batches": {str(batch): {"ratios": tables(arms), "measured": arms} for batch, arms in found.items()},
        }  # fmt: skip
        print(f"took {time.monotonic() - started:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
